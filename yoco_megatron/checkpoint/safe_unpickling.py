"""Restricted unpicklers: loading a checkpoint runs no code from it. `upstream/safe_loading.py` installs them.

torch.distributed.checkpoint unpickles two things without restraint: the file `.metadata`
(torch/distributed/checkpoint/filesystem.py:read_metadata) and every entry that is no tensor
(torch/distributed/checkpoint/default_planner.py:load_bytes). Here the first may only name the classes that such a file
is made of; the second is loaded with `weights_only=True`, whose list of harmless classes Megatron has extended.

Transformer Engine stores the scales of FP8's delayed scaling as a pickle inside a tensor of bytes, and refuses to load
it unless an environment variable lets everything in. Here it is loaded, and may only name what such a state is made of.

A pickle is a program that can call whatever it can name, and set attributes of whatever it has. So it gets no class,
function or module of anybody's: only types that cannot be changed, written in C, and the stand-ins of this file, which
cannot be changed either. A stand-in makes an empty record, which becomes one of the real class when it is given the
fields that this class has, in their types.
"""

import dataclasses
import gc
import importlib
import inspect
import io
import logging
import pickle
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from pathlib import Path, PurePath
from typing import IO, Any, NoReturn

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as records
from torch.serialization import _get_layout

from yoco_megatron.checkpoint.layout import COMPLETE
from yoco_megatron.utils.small_files import BadFile

logger = logging.getLogger(__name__)


class _Refused(ValueError):
    """What a pickle asks for and does not get."""


class _Sealed(type):
    """The type of the stand-ins: a class whose attributes no pickle can set."""

    @property
    def __setstate__(cls) -> NoReturn:  # pickle asks for it before it sets attributes; an error here ends it
        raise _Refused(f"sets attributes of the class {cls.__name__}")

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise _Refused(f"sets {name} of the class {cls.__name__}")


def _call(function: Callable) -> Any:
    """A stand-in for `function`, or for a class that is made by a call."""

    def new(cls: type, *args: Any) -> Any:
        return function(*args)

    return _Sealed(function.__name__, (), {"__new__": new, "__slots__": ()})


def _record(cls: type, types: dict[str, Any] | None = None) -> Any:
    """A stand-in for a dataclass.

    Args:
        types: field -> what isinstance wants of its value; by default anything, and attributes that are no field, but
            neither methods nor properties of the class.
    """
    fields = dataclasses.fields(cls)
    names = types.keys() if types else {field.name for field in fields}
    missing = dataclasses.MISSING
    required = {field.name for field in fields if field.default is missing and field.default_factory is missing}

    def __setstate__(self: Any, state: Any) -> None:
        known = type(state) is dict and required <= state.keys()
        if not known or not all(name in names or (types is None and _is_data(cls, name)) for name in state):
            raise _Refused(f"gives a {cls.__name__} other fields than it has")
        for name, value in state.items():
            if types and not isinstance(value, types[name]):
                raise _Refused(f"gives a {cls.__name__} a {type(value).__name__} as {name}")
            if type(value) is _Member:
                state[name] = value.real()
        self.__dict__.update(state)
        self.__class__ = cls

    return _Sealed(cls.__name__, (), {"__setstate__": __setstate__})


def _is_data(cls: type, name: str) -> bool:
    """Whether an instance may have an attribute of its own called `name`: Transformer Engine caches a repr in one."""
    return not hasattr(inspect.getattr_static(cls, name, None), "__get__")


class _Member:
    """A stand-in for a member of an enumeration: there is one for all, which a pickle must not change."""

    __slots__ = ("kind", "value")

    def __init__(self, kind: Any, value: Any) -> None:
        self.kind, self.value = kind, value

    def real(self) -> Any:
        """Raises ValueError where there is no such member."""
        return self.kind(self.value)


def _member_of(kind: Any) -> Any:
    def member(value: Any) -> _Member:
        return _Member(kind, value)

    return _call(member)


class _TensorProperties(metaclass=_Sealed):
    """Stands for torch's, which has a __setstate__ of its own."""

    def __setstate__(self, state: Any) -> None:
        types = (torch.dtype, torch.layout, bool, _Member, bool)
        if type(state) is not tuple or [*map(type, state)] != [*types]:
            raise _Refused("gives a TensorProperties other fields than it has")
        dtype, layout, requires_grad, memory_format, pin_memory = state
        self.__class__ = records.TensorProperties  # type: ignore[assignment]
        records.TensorProperties.__setstate__(
            self,  # type: ignore[arg-type]
            (dtype, layout, requires_grad, memory_format.real(), pin_memory),
        )


_TEXT, _SIZE = (str, type(None)), (torch.Size, type(None))
METADATA: dict[tuple[str, str], Any] = {
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "slice"): slice,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): _call(Path),
    ("pathlib", "PurePosixPath"): _call(PurePath),
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): _call(_get_layout),
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _record(
        filesystem._StorageInfo,
        {"relative_path": str, "offset": int, "length": int, "transform_descriptors": (list, tuple, type(None))},
    ),
    **{
        ("torch.distributed.checkpoint.metadata", name): stand_in
        for name, stand_in in {
            "BytesStorageMetadata": _call(records.BytesStorageMetadata),
            "ChunkStorageMetadata": _record(records.ChunkStorageMetadata, {"offsets": torch.Size, "sizes": torch.Size}),
            "Metadata": _record(
                records.Metadata,
                {
                    "state_dict_metadata": dict,
                    "planner_data": object,
                    "storage_data": dict,
                    "storage_meta": (records.StorageMeta, type(None)),
                    "version": _TEXT,
                    "mcore_data": dict,  # of older versions of Megatron
                },
            ),
            "MetadataIndex": _record(records.MetadataIndex, {"fqn": str, "offset": _SIZE, "index": (int, type(None))}),
            "StorageMeta": _record(
                records.StorageMeta,
                {"checkpoint_id": (*_TEXT, PurePath), "save_id": _TEXT, "load_id": _TEXT, "modules": list},
            ),
            "TensorProperties": _TensorProperties,
            "TensorStorageMetadata": _record(
                records.TensorStorageMetadata,
                {"properties": records.TensorProperties, "size": torch.Size, "chunks": list},
            ),
            "_MEM_FORMAT_ENCODING": _member_of(records._MEM_FORMAT_ENCODING),
        }.items()
    },
}
"""(module, name) -> what a checkpoint's `.metadata` gets for it."""
MOVED = {"pathlib._local": "pathlib"}  # as Python 3.13 names it


def _load_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def _rebuild_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> torch.Tensor:
    """Without hooks, which the other arguments could be."""
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())


FP8_STATE: dict[tuple[str, str], Any] = {
    # How a pickled tensor names what unpickles its content: torch's own, and what Megatron puts in its place.
    ("torch.storage", "_load_from_bytes"): _call(_load_storage),
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _call(_load_storage),
    ("torch._utils", "_rebuild_tensor_v2"): _call(_rebuild_tensor),
    ("collections", "OrderedDict"): OrderedDict,
}
# Imported when one is named: Transformer Engine needs its library. The class of Megatron has another constructor, which
# unpickling does not call.
_RECIPES = "transformer_engine.common.recipe"
FP8_RECIPES: dict[tuple[str, str], Callable[[Any], Any]] = {
    **{(_RECIPES, f"{kind}Scaling"): _record for kind in ("Delayed", "Float8Current", "Float8Block")},
    **{(_RECIPES, f"{kind}BlockScaling"): _record for kind in ("MXFP8", "NVFP4")},
    **{(_RECIPES, name): _record for name in ("MMParams", "QParams")},
    (_RECIPES, "Format"): _member_of,
    (_RECIPES, "_FormatHelper"): _call,
    (_RECIPES, "_OverrideLinearPrecision"): _call,
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"): _record,
}


class _Generator(torch.Generator):
    """torch's reads the state that a pickle gives it as if it were one."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 3 or not isinstance(state[2], torch.Tensor):
            raise _Refused("gives a random generator a state that is none")
        super().__setstate__(state)


def stand_in_for(allowed: Any) -> Any:
    """What torch's list of safe globals should hold in the place of `allowed`, one of its entries."""
    if not isinstance(allowed, type) or not issubclass(allowed, Enum | torch.Generator):
        return allowed
    instead = _call(allowed) if issubclass(allowed, Enum) else _Generator
    return instead, f"{allowed.__module__}.{allowed.__qualname__}"


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's `.metadata`, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises ValueError for a name that no `.metadata` needs."""
        known = MOVED.get(module, module), name
        if known in METADATA:
            return METADATA[known]
        raise _Refused(f"names {module}.{name}")


class FP8StateUnpickler(pickle.Unpickler):
    """Unpickles what Transformer Engine saves of a module with delayed scaling: a recipe, tensors, plain values."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises ValueError for a name that no such state needs."""
        if (module, name) in FP8_STATE:
            return FP8_STATE[module, name]
        if (module, name) in FP8_RECIPES:
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and found.__module__ == module:
                return FP8_RECIPES[module, name](found)
        raise _Refused(f"names {module}.{name}")


def _unpickle(kind: type[pickle.Unpickler], file: IO[bytes], what: str) -> Any:
    """Raises BadFile, and says so, as torch's loader continues without metadata and tells only that there are none."""
    collects = gc.isenabled()
    gc.disable()  # nothing of a large checkpoint's records is garbage: searching them takes most of the time
    try:
        return kind(file).load()
    except _Refused as error:
        message = f"{what} {error}, which no checkpoint needs and which could run code: do not trust this folder"
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises any type
        message = f"{what} is damaged ({type(error).__name__}: {error}): copy the checkpoint again"
    finally:
        if collects:
            gc.enable()
    logger.error(message)
    raise BadFile(message)


def load_fp8_state(content: bytes) -> Any:
    """In place of `pickle.loads` in Transformer Engine's modules. Raises ValueError."""
    return _unpickle(FP8StateUnpickler, io.BytesIO(content), "--load: the checkpoint's FP8 state")


def load_metadata(file: IO[bytes]) -> Any:
    """In place of `pickle.load` for a checkpoint's `.metadata`. Raises BadFile."""
    name = str(getattr(file, "name", "the checkpoint's .metadata"))
    metadata = _unpickle(MetadataUnpickler, file, name)
    wrong = _other_than_metadata(metadata)
    if wrong:
        raise BadFile(f"{name} {wrong}: copy the checkpoint again")
    return metadata


def _other_than_metadata(metadata: Any) -> str | None:
    """What makes an unpickled object no metadata of a checkpoint, or None."""
    if not isinstance(metadata, records.Metadata) or not isinstance(metadata.storage_data, dict):
        return "does not hold the metadata of a checkpoint"
    entries = (records.TensorStorageMetadata, records.BytesStorageMetadata)
    for name, entry in metadata.state_dict_metadata.items():
        chunks = getattr(entry, "chunks", ())
        if not isinstance(name, str) or not isinstance(entry, entries):
            return f"holds an entry that is no tensor and no bytes: {name!r:.80}"
        if not all(isinstance(chunk, records.ChunkStorageMetadata) for chunk in chunks):
            return f"holds a part of {name:.80} that is none"
    for index, info in metadata.storage_data.items():
        if not isinstance(index, records.MetadataIndex) or not isinstance(info, filesystem._StorageInfo):
            return f"holds a place that is none: {index!r:.80}"
        if "/" in info.relative_path or info.relative_path in ("", ".", "..") or info.offset < 0 or info.length < 0:
            return f"names a place outside the checkpoint: {info.relative_path!r:.80}"
    return None


def check_regular(checkpoint: Path) -> None:
    """Raises BadFile unless what Megatron and torch open are files: they would wait for a pipe, or for ever."""
    named = (checkpoint / COMPLETE, checkpoint / ".metadata")
    for path in (*named, *checkpoint.glob("*.distcp"), *checkpoint.glob("*.pt")):
        if not path.is_file():
            raise BadFile(f"{path} is missing, or no regular file: copy the checkpoint again")


def check_installed() -> None:
    """RuntimeError where loading a checkpoint could run code from it: call before anything loads one."""
    if filesystem.pickle.load is not load_metadata:
        raise RuntimeError(
            "checkpoints are not loaded safely in this process: call yoco_megatron.startup.prepare first"
        )
