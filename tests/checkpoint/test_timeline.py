"""A run that goes back never loads what it left, wherever it is killed."""

import os
import shutil
from pathlib import Path

import pytest

from yoco_megatron.checkpoint import integrity, layout, pruning, timeline


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def folder_of(path: Path, *iterations: int) -> Path:
    for iteration in iterations:
        one = layout.path_of(path, iteration)
        one.mkdir(parents=True)
        (one / "__0_0.distcp").write_bytes(bytes([iteration]))
        (one / layout.COMPLETE).write_text('{"sharded_backend": "torch_dist"}')
        integrity.write_manifest(one)
    layout.write_tracker(path, max(iterations))
    return path


def test_goes_back_for_good(tmp_path):
    folder = folder_of(tmp_path, 5, 10, 15)
    timeline.go_back(folder, 9)
    assert integrity.newest_good(folder) == 5 and layout.iterations(folder) == [5]
    (folder / layout.TRACKER).unlink()  # as a crash can leave it
    assert integrity.newest_good(folder) == 5
    assert "abandoned" in integrity.find_corruption(layout.path_of(folder, 10))


def test_to_the_beginning(tmp_path):
    folder = folder_of(tmp_path, 5, 10)
    timeline.go_back(folder, 4)
    assert layout.tracked_iteration(folder) == timeline.BEGINNING
    assert integrity.newest_good(folder) is None and not (folder / layout.TRACKER).exists()
    assert integrity.newest_good(folder) is None, "without the tracker, too"


def test_nothing_newer_changes_nothing(tmp_path):
    folder = folder_of(tmp_path, 5, 10)
    before = sorted(folder.rglob("*"))
    timeline.go_back(folder, 10)
    assert sorted(folder.rglob("*")) == before and layout.tracked_iteration(folder) == 10


@pytest.mark.parametrize("target", [5, 0])
def test_killed_between_any_two_changes(tmp_path, target, monkeypatch):
    """Before the first change it has not gone back; after it, it has, and stays so."""
    original = folder_of(tmp_path / "original", 5, 10, 15)
    for moment in range(20):
        folder = tmp_path / f"killed{moment}"
        shutil.copytree(original, folder)
        done = []

        def change(function, done=done, moment=moment):
            def or_die(*args, **kwargs):
                if len(done) == moment:
                    raise Killed
                result = function(*args, **kwargs)
                done.append(function)
                return result

            return or_die

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "write_text"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
                patch.setattr(owner, name, change(getattr(owner, name)))
            try:
                timeline.go_back(folder, target)
                integrity.newest_good(folder)
                ended = True
            except Killed:
                ended = False
        went_back = any(function.__name__ == "replace" for function in done)
        wanted = (target or None) if went_back else 15
        assert integrity.newest_good(folder) == wanted, f"killed at change {moment}"
        assert integrity.newest_good(folder) == wanted, "and it stays so"
        if ended:
            break
    assert ended and moment >= 4


def test_abandoned_ones_are_pruned(tmp_path):
    folder = folder_of(tmp_path, 5, 10, 15)
    timeline.go_back(folder, 5)
    pruning.remove_surplus(folder, keep=2, keep_every=None)
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000005"]
