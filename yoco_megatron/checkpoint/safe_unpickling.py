"""Restricted unpicklers: loading a checkpoint runs no code from it. `upstream/safe_loading.py` installs them.

torch.distributed.checkpoint unpickles two things without restraint: the file `.metadata`
(torch/distributed/checkpoint/filesystem.py:read_metadata) and every entry that is no tensor
(torch/distributed/checkpoint/default_planner.py:load_bytes). Here the first may only name the classes that such a file
is made of; the second is loaded with `weights_only=True`, whose list of harmless classes Megatron has extended.

Transformer Engine stores the scales of FP8's delayed scaling as a pickle inside a tensor of bytes, and refuses to load
it unless an environment variable lets everything in. Here it is loaded, and may only name what such a state is made of.
"""

import io
import logging
import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem

logger = logging.getLogger(__name__)

# module -> names that may be looked up there; None for all of a module that holds plain records.
ALLOWED: dict[str, set[str] | None] = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "builtins": {"set", "frozenset", "slice"},
}


# How a pickled tensor names the function that unpickles its content: torch's own, and what Megatron puts in its place.
LOADS_A_STORAGE = {("torch.storage", "_load_from_bytes"), ("megatron.core.safe_globals", "safe_load_from_bytes")}
PARTS_OF_A_TENSOR = {("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")}
# A class of Transformer Engine's recipe with another constructor, which unpickling does not call.
MEGATRONS_RECIPE = ("megatron.core.extensions.transformer_engine", "TEDelayedScaling")


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's `.metadata`, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises ValueError for a name that no `.metadata` needs."""
        names = ALLOWED.get(module, set())
        if (names is None or name in names) and "." not in name:
            return super().find_class(module, name)
        raise _refusal(".metadata", module, name)


class FP8StateUnpickler(pickle.Unpickler):
    """Unpickles what Transformer Engine saves of a module with delayed scaling: a recipe, tensors, plain values."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises ValueError for a name that no such state needs."""
        if (module, name) in LOADS_A_STORAGE:
            return _load_storage
        if (module, name) in PARTS_OF_A_TENSOR or (module, name) == MEGATRONS_RECIPE:
            return super().find_class(module, name)
        if module == "transformer_engine.common.recipe" and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise _refusal("FP8 state", module, name)


def _refusal(what: str, module: str, name: str) -> ValueError:
    message = (
        f"--load: the checkpoint's {what} names {module}.{name}, which no checkpoint needs and which could run code: "
        "do not trust this folder"
    )
    logger.error(message)  # torch's loader continues without metadata, and its error says only that there is none
    return ValueError(message)


def _load_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=True)


def load_fp8_state(content: bytes) -> Any:
    """In place of `pickle.loads` in Transformer Engine's modules."""
    return FP8StateUnpickler(io.BytesIO(content)).load()


def load_metadata(file: IO[bytes]) -> Any:
    """In place of `pickle.load` for a checkpoint's `.metadata`."""
    return MetadataUnpickler(file).load()


def check_installed() -> None:
    """RuntimeError where loading a checkpoint could run code from it: call before anything loads one."""
    if filesystem.pickle.load is not load_metadata:
        raise RuntimeError(
            "checkpoints are not loaded safely in this process: call yoco_megatron.startup.prepare first"
        )
