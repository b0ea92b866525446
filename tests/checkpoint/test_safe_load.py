"""A checkpoint that carries code is refused, and the code does not run; honest ones load (tests/test_resume.py too)."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import default_planner, filesystem

from yoco_megatron.checkpoint import safe_load


class Evil:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "pickle", filesystem.pickle)
    monkeypatch.setattr(default_planner.DefaultLoadPlanner, "load_bytes", default_planner.DefaultLoadPlanner.load_bytes)
    safe_load.install()


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


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "os.system", "torch.load", "torch.hub.load"])
def test_lookups_are_a_short_list(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(ValueError, match="do not trust"):
        safe_load.MetadataUnpickler(io.BytesIO()).find_class(module, attribute)
