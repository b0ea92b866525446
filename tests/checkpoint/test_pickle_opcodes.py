"""Every opcode of pickle that can call or set something, tried on each of our unpicklers; nothing may come of it."""

import contextlib
import copyreg
import io
import pickle
import pickletools
import struct
import types
import zipfile
from collections.abc import Callable, Iterator
from enum import EnumType
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint import filesystem, metadata

from yoco_megatron.checkpoint import safe_unpickling

# Opcodes that push plain values, or move what is on the stack or in the memo.
HARMLESS = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
    BINBYTES8 BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER NONE NEWTRUE NEWFALSE UNICODE SHORT_BINUNICODE BINUNICODE
    BINUNICODE8 FLOAT BINFLOAT EMPTY_LIST LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT EMPTY_SET
    FROZENSET POP DUP MARK POP_MARK GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE PROTO STOP FRAME
""".split()  # noqa: SIM905 (fifty lines otherwise)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


MKDIR = named("os", "mkdir")
EXTENSION = 240


def calls(path: str) -> dict[str, bytes]:
    """Opcode -> a program that makes the folder `path` with it, given unrestrained names."""
    argument = text(path)
    arguments = argument + b"\x85"
    return {
        "GLOBAL": MKDIR + arguments + b"R.",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("mkdir") + b"\x93" + arguments + b"R.",
        "INST": b"(" + argument + b"ios\nmkdir\n.",
        "OBJ": b"(" + MKDIR + argument + b"o.",
        "REDUCE": named("posix", "mkdir") + arguments + b"R.",
        "NEWOBJ": b"\x80\x02" + named("functools", "partial") + MKDIR + argument + b"\x86\x81)R.",
        "NEWOBJ_EX": b"\x80\x04" + named("functools", "partial") + MKDIR + b"\x85}\x92" + arguments + b"R.",
        "EXT1": b"\x80\x02\x82" + struct.pack("<B", EXTENSION) + arguments + b"R.",
        "EXT2": b"\x80\x02\x83" + struct.pack("<H", EXTENSION) + arguments + b"R.",
        "EXT4": b"\x80\x02\x84" + struct.pack("<i", EXTENSION) + arguments + b"R.",
        "PERSID": b"Pos.mkdir\n.",
        "BINPERSID": b"(" + MKDIR + argument + b"tQ.",
    }


def sets(target: bytes, value: bytes) -> dict[str, bytes]:
    """Opcode (and how) -> a program that sets, on what `target` pushes, the attribute or item `changed` to `value`."""
    pair = text("changed") + value
    return {
        "BUILD": target + b"}" + pair + b"sb.",
        "BUILD with slots": target + b"N}" + pair + b"s\x86b.",
        "BUILD twice": target + b"}" + text("__setstate__") + value + b"sb}" + pair + b"sb.",
        "SETITEM": target + pair + b"s.",
        "SETITEMS": target + b"(" + pair + b"u.",
        "APPEND": target + value + b"a.",
        "APPENDS": target + b"(" + value + b"e.",
        "ADDITEMS": b"\x80\x04" + target + b"(" + value + b"\x90.",
    }


def test_no_opcode_is_left_out() -> None:
    tried = {how.split()[0] for how in (*calls(""), *sets(b"", b""))}
    assert tried | {*HARMLESS} == {opcode.name for opcode in pickletools.opcodes}


# -- our unpicklers

VALUES = {"RerunDiagnostic": "correct_result", "RerunMode": "disabled", "_MEM_FORMAT_ENCODING": 0, "Generator": "cpu"}


class Recipe:
    """Stands for a class of Transformer Engine, which needs its library to import."""


def weights_only(content: bytes) -> Any:
    """As every entry of a checkpoint that is no tensor is loaded, with what Megatron and we let torch take."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    file.seek(0)
    return torch.load(file, weights_only=True)


def _torchs_names() -> Iterator[tuple[str, str]]:
    for entry in torch.serialization.get_safe_globals():
        whole = entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__name__}"
        module, _, name = whole.rpartition(".")
        yield module, name


UNPICKLERS: dict[str, tuple[Callable[[bytes], Any], list[tuple[str, str]]]] = {
    "metadata": (lambda content: safe_unpickling.load_metadata(io.BytesIO(content)), [*safe_unpickling.METADATA]),
    "FP8 state": (
        safe_unpickling.load_fp8_state,
        [*safe_unpickling.FP8_STATE, ("transformer_engine.common.recipe", "DelayedScaling")],
    ),
    "weights_only": (weights_only, [*_torchs_names()]),
}


@pytest.fixture(params=UNPICKLERS)
def unpickler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    recipe = types.ModuleType("transformer_engine.common.recipe")
    recipe.DelayedScaling = Recipe  # type: ignore[attr-defined]
    monkeypatch.setattr(Recipe, "__module__", recipe.__name__)
    for name in ("transformer_engine", "transformer_engine.common", recipe.__name__):
        monkeypatch.setitem(__import__("sys").modules, name, recipe)
    return UNPICKLERS[request.param]


@pytest.fixture
def extension() -> Iterator[None]:
    copyreg.add_extension("os", "mkdir", EXTENSION)
    yield
    copyreg.remove_extension("os", "mkdir", EXTENSION)


@pytest.mark.parametrize("opcode", calls(""))
def test_nothing_is_called(opcode: str, unpickler: tuple, tmp_path: Path, extension: None) -> None:
    load, _ = unpickler
    program = calls(str(tmp_path / "made"))[opcode]
    with pytest.raises((ValueError, pickle.UnpicklingError, RuntimeError)):
        load(program)
    assert not (tmp_path / "made").exists()


def test_the_programs_work_without_restraint(tmp_path: Path, extension: None) -> None:
    """Otherwise the test above could not fail."""
    for opcode, program in calls(str(tmp_path / "made")).items():
        if "PERSID" in opcode:  # an unpickler decides itself what this means
            continue
        pickle.loads(program)
        (tmp_path / "made").rmdir()


def _real(module: str, name: str) -> Any:
    for source in (metadata, filesystem, torch, torch.serialization):
        if source.__name__ == module:
            return getattr(source, name)
    return {"pathlib": Path, "transformer_engine.common.recipe": Recipe}.get(module)


def _attributes(thing: Any) -> dict[str, Any]:
    caches = ("_abc_impl", "cache")
    return {key: repr(value) for key, value in getattr(thing, "__dict__", {}).items() if key not in caches}


@pytest.mark.parametrize("how", sets(b"", b""))
def test_nothing_is_set_on_what_a_pickle_can_name(how: str, unpickler: tuple) -> None:
    """No class, function or member of an enumeration is changed: neither the real one nor what stands for it."""
    load, names = unpickler
    safe_unpickling._get_layout("torch.strided")  # torch fills its table at the first call
    things = [thing for pair in names if (thing := _real(*pair)) is not None]
    things += [thing for table in (safe_unpickling.METADATA, safe_unpickling.FP8_STATE) for thing in table.values()]
    things += [*metadata._MEM_FORMAT_ENCODING, *SAFE_GLOBALS]
    things += [member for kind in SAFE_GLOBALS if isinstance(kind, EnumType) for member in kind]
    before = [_attributes(thing) for thing in things]
    for module, name in names:
        target = named(module, name)
        value = VALUES.get(name, 1)
        argument = text(value) if isinstance(value, str) else b"K" + bytes([value])
        # The class itself, what it makes of nothing, and what it makes of a value: an enumeration's member.
        for made in (target, target + b")\x81", target + b")R", target + argument + b"\x85R"):
            for value in (b"K\x01", target, named(*names[0])):
                with contextlib.suppress(Exception):  # a refusal, or a class that is made of something else
                    load(b"\x80\x02" + sets(made, value)[how])
    for thing, was, now in zip(things, before, map(_attributes, things)):
        assert now == was, thing


def test_what_a_pickle_gets_cannot_be_changed() -> None:
    immutable = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE
    for table in (safe_unpickling.METADATA, safe_unpickling.FP8_STATE):
        for pair, thing in table.items():
            kind = thing if isinstance(thing, type) else type(thing)
            assert kind.__flags__ & immutable or isinstance(kind, safe_unpickling._Sealed), pair
            with pytest.raises((TypeError, AttributeError, ValueError)):
                thing.changed = 1


def test_other_names_of_the_same_modules_are_refused() -> None:
    for module in {module for module, _ in safe_unpickling.METADATA}:
        for name in vars(__import__(module, fromlist=["x"])):
            if (module, name) not in safe_unpickling.METADATA:
                with pytest.raises(ValueError, match="do not trust"):
                    safe_unpickling.load_metadata(io.BytesIO(named(module, name) + b"."))


@pytest.mark.parametrize("name", ["Metadata.__init__", "MetadataIndex.__init__.__globals__", "Enum", "Any", "os"])
def test_dotted_and_imported_names_are_refused(name: str) -> None:
    program = b"\x80\x04" + text(metadata.__name__) + text(name) + b"\x93."
    with pytest.raises(ValueError, match="do not trust"):
        safe_unpickling.load_metadata(io.BytesIO(program))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "", "..", "a/b"])
def test_places_outside_the_checkpoint_are_refused(path: str) -> None:
    index, place = metadata.MetadataIndex("x"), filesystem._StorageInfo(path, 0, 1)
    content = pickle.dumps(metadata.Metadata({"x": metadata.BytesStorageMetadata()}, storage_data={index: place}))
    with pytest.raises(ValueError, match="outside"):
        safe_unpickling.load_metadata(io.BytesIO(content))
