"""A checkpoint that carries code is refused, and the code does not run; honest ones load (tests/test_resume.py too)."""

import dataclasses
import importlib
import io
import os
import pickle
import re
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core.safe_globals import safe_load_from_bytes
from torch.distributed.checkpoint import filesystem

from yoco_megatron import runtime
from yoco_megatron.checkpoint import safe_unpickling
from yoco_megatron.checkpoint.common_state import common_state
from yoco_megatron.upstream import registry


class Evil:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def state() -> dict:
    return {
        "weight": torch.arange(6.0).view(2, 3),
        "step": 7,
        "nested": {"names": ["a", "b"], "half": torch.ones(2).half()},
    }


def test_honest_checkpoint_loads(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=tmp_path, no_dist=True)
    loaded = {"weight": torch.zeros(2, 3), "step": 0, "nested": {"names": [], "half": torch.zeros(2).half()}}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(loaded["weight"], state()["weight"])
    assert loaded["step"] == 7


def test_a_checkpoint_of_python_3_13_loads(tmp_path: Path) -> None:
    """Its paths are of another module, and the folder's own path is in each .metadata."""
    dcp.save(state(), checkpoint_id=tmp_path, no_dist=True)
    metadata = pickle.dumps(filesystem.FileSystemReader(tmp_path).read_metadata(), protocol=2)
    other = metadata.replace(b"cpathlib\nPosixPath", b"cpathlib._local\nPosixPath")
    assert other != metadata
    (tmp_path / ".metadata").write_bytes(other)
    assert "weight" in filesystem.FileSystemReader(tmp_path).read_metadata().state_dict_metadata


def test_without_the_unpicklers_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a process that has not called startup.prepare."""
    monkeypatch.setattr(filesystem, "pickle", pickle)
    with pytest.raises(RuntimeError, match=r"startup\.prepare"):
        common_state(tmp_path)


def test_code_in_metadata_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dcp.save(state(), checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "evil")))
    with pytest.raises(BaseException, match="metadata"):  # what dcp raises is no Exception
        dcp.load({"weight": torch.zeros(2, 3)}, checkpoint_id=tmp_path, no_dist=True)
    assert "do not trust this folder" in caplog.text
    assert not (tmp_path / "evil").exists()


def test_code_in_an_entry_is_refused(tmp_path: Path) -> None:
    dcp.save(state() | {"extra": Evil(tmp_path / "evil")}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(BaseException, match=r"[Ww]eights.only|mkdir"):
        dcp.load({"extra": None}, checkpoint_id=tmp_path, no_dist=True)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins.eval", "builtins.getattr", "os.system", "torch.load", "torch.hub.load"],
)
def test_lookups_are_a_short_list(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ValueError, match=re.escape(name)):
        safe_unpickling.MetadataUnpickler(io.BytesIO()).find_class(module, attribute)


class Format(Enum):
    HYBRID = (1, 2)


class Recipe:
    """Stands for the base of Transformer Engine's recipes, whose repr is kept beside the fields."""

    _cached_repr: str | None = None

    def __repr__(self) -> str:
        self._cached_repr = self._cached_repr or type(self).__name__
        return self._cached_repr


@dataclass(repr=False)
class DelayedScaling(Recipe):
    """Stands for Transformer Engine's, which needs its library to import."""

    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024


class TEDelayedScaling(DelayedScaling):
    """Stands for Megatron's, whose constructor wants a configuration."""

    def __init__(self, config: str) -> None:
        super().__init__()
        self.of_another_version = 1


@pytest.fixture
def fp8_state(monkeypatch: pytest.MonkeyPatch) -> dict:
    """As Transformer Engine's `get_extra_state` pickles it."""
    module = types.ModuleType("transformer_engine.common.recipe")
    for kind in (Format, DelayedScaling):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        monkeypatch.setattr(module, kind.__name__, kind, raising=False)
    module.mkdir = os.mkdir
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    used = DelayedScaling()
    repr(used)
    monkeypatch.setattr(TEDelayedScaling, "__module__", extension.__name__)
    monkeypatch.setattr(extension, "TEDelayedScaling", TEDelayedScaling, raising=False)
    return {
        "recipe": [used, TEDelayedScaling("config")],
        "scale_fwd": torch.rand(3),
        "amax_history_fwd": torch.rand(1024, 3),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "name": "a", "pair": (1, [2.0])},
    }


def named_by_torch(content: bytes) -> None:
    """Stands for torch's own function, in whose place Megatron puts another."""


named_by_torch.__module__, named_by_torch.__qualname__ = "torch.storage", "_load_from_bytes"


@pytest.mark.parametrize("load_from_bytes", [named_by_torch, safe_load_from_bytes])
def test_fp8_state_loads(load_from_bytes: Callable, fp8_state: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles name torch's function, or the one that Megatron puts in its place."""
    monkeypatch.setattr(torch.storage, "_load_from_bytes", load_from_bytes)
    content = pickle.dumps(fp8_state)
    assert load_from_bytes.__module__.encode() in content
    loaded = safe_unpickling.load_fp8_state(content)
    assert torch.equal(loaded.pop("amax_history_fwd"), fp8_state.pop("amax_history_fwd"))
    assert torch.equal(loaded.pop("scale_fwd"), fp8_state.pop("scale_fwd"))
    assert loaded == fp8_state


class Borrowed(Evil):
    """A function that the recipe's module happens to hold."""

    def __reduce__(self):
        function = types.FunctionType(os.path.join.__code__, {}, "mkdir")
        function.__module__, function.__qualname__ = "transformer_engine.common.recipe", "mkdir"
        sys.modules[function.__module__].mkdir = function
        return function, (str(self.path),)


class Nested(Evil):
    """A tensor's storage that is a pickle of code."""

    def __reduce__(self):
        file = io.BytesIO()
        torch.save(Evil(self.path), file)
        return torch.storage._load_from_bytes, (file.getvalue(),)


@pytest.mark.parametrize("kind", [Evil, Borrowed, Nested])
def test_code_in_fp8_state_is_refused(kind: type[Evil], fp8_state: dict, tmp_path: Path) -> None:
    content = pickle.dumps(fp8_state | {"scale_bwd": kind(tmp_path / "evil")})
    with pytest.raises((ValueError, pickle.UnpicklingError), match=r"mkdir"):
        safe_unpickling.load_fp8_state(content)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("asks", [True, False])
def test_transformer_engine_unpickles_with_restraint(
    asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each of its modules that unpickle, whether or not its version asks before it does."""
    package = "transformer_engine.pytorch"
    for name in ("", "module", "module.base", "ops", "ops.op", *(["_extra_state"] if asks else [])):
        parent, _, child = f"{package}.{name}".rstrip(".").rpartition(".")
        module = types.ModuleType(f"{parent}.{child}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.pickle, module.unsafe_pickle_extra_state_enabled = pickle, lambda: False
        if name:
            setattr(sys.modules[parent], child, module)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setattr(runtime, "has_transformer_engine", lambda: True)
    for entry in registry.replacements:
        if entry.module.startswith(package) and entry.when(Namespace()):
            dataclasses.replace(entry, is_installed=False).install()
    for name in ("module.base", "ops.op"):
        loads = sys.modules[f"{package}.{name}"].pickle.loads
        assert loads(pickle.dumps({"num_gemms": 1})) == {"num_gemms": 1}
        with pytest.raises(ValueError, match="do not trust"):
            loads(pickle.dumps(Evil(tmp_path / "evil")))
    assert not (tmp_path / "evil").exists()
    assert not asks or sys.modules[f"{package}._extra_state"].unsafe_pickle_extra_state_enabled()
