"""Which checkpoint a run loads: persistent, between those, or the one that was asked for."""

from argparse import Namespace
from pathlib import Path

import pytest
from support.worlds import process_groups

from yoco_megatron.checkpoint import integrity, layout, timeline
from yoco_megatron.upstream import checkpointing


def save(folder: Path, iteration: int) -> Path:
    path = layout.path_of(folder, iteration)
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"weights")
    (path / layout.COMPLETE).write_text('{"sharded_backend": "torch_dist"}')
    integrity.write_manifest(path)
    layout.write_tracker(folder, iteration)
    return path


def choose(folder: Path, ckpt_step: int | None = None) -> Path | None:
    options = Namespace(
        ckpt_step=ckpt_step, non_persistent_ckpt_type="global", non_persistent_global_ckpt_dir=None, save=str(folder)
    )
    with process_groups(0, 1):
        return checkpointing._choose(options, folder)


def test_what_is_not_persistent_is_loaded_where_it_is_newer_and_whole(tmp_path):
    aside = tmp_path / checkpointing.NON_PERSISTENT
    assert choose(tmp_path) is None
    five = save(tmp_path, 5)
    eight = save(aside, 8)
    assert choose(tmp_path) == eight and choose(tmp_path, ckpt_step=5) == five
    (eight / "__0_0.distcp").write_bytes(b"weighty")
    assert choose(tmp_path) == five
    assert not (aside / layout.TRACKER).exists(), "else Megatron would load it"


def test_an_abandoned_one_is_not_loaded_when_asked_for(tmp_path):
    save(tmp_path, 5)
    ten = save(tmp_path, 10)
    timeline.go_back(tmp_path, 5)
    with pytest.raises(ValueError, match=r"--ckpt-step 10 .* the run has gone back from it, see abandoned there"):
        choose(tmp_path, ckpt_step=10)
    (ten / layout.ABANDONED).unlink()
    assert choose(tmp_path, ckpt_step=10) == ten
