"""Manifest, verification, fall-back and pruning on folders of files; in one process and in two."""

import json
import random
from pathlib import Path

import pytest
from support.worlds import run_world

from yoco_megatron.checkpoint import integrity, layout, pruning


def write(run: Path, iteration: int, manifest: bool = True, seed: int = 0) -> Path:
    """A checkpoint of random bytes, as Megatron leaves one."""
    path = layout.path_of(run, iteration)
    path.mkdir(parents=True)
    rng = random.Random(iteration + seed)
    for rank in range(3):
        (path / f"__{rank}_0.distcp").write_bytes(rng.randbytes(10_000))
    (path / ".metadata").write_bytes(rng.randbytes(100))
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    if manifest:
        integrity.write_manifest(path)
    layout.write_tracker(run, iteration)
    return path


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "one bit": lambda path: flip_a_bit(path / "__1_0.distcp"),
    "cut short": lambda path: (path / "__1_0.distcp").write_bytes(b"x" * 9_000),
    "file gone": lambda path: (path / "__2_0.distcp").unlink(),
    "metadata gone": lambda path: (path / ".metadata").unlink(),
    "not written to its end": lambda path: (path / "metadata.json").unlink(),
    "manifest cut short": lambda path: (path / "integrity.json").write_text('{"files": {'),
    "folder gone": lambda path: [file.unlink() for file in path.iterdir()] and path.rmdir(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_is_passed_over(tmp_path, damage, capsys):
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    assert integrity.newest_good(tmp_path) == 30
    damage(layout.path_of(tmp_path, 30))
    assert integrity.newest_good(tmp_path) == 20
    assert "falling back to the checkpoint of iteration 20: iteration 30: " in capsys.readouterr().out
    assert layout.tracked_iteration(tmp_path) == 20, "what Megatron will load"


def test_all_damaged_is_an_error_and_no_fresh_start(tmp_path):
    for iteration in (10, 20):
        flip_a_bit(write(tmp_path, iteration) / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"no checkpoint there is whole: iteration 20: .*hash differs.*iteration 10"):
        integrity.newest_good(tmp_path)


def test_nothing_there_is_a_fresh_start(tmp_path):
    assert integrity.newest_good(tmp_path) is None
    assert integrity.newest_good(tmp_path / "missing") is None


def test_folder_of_a_save_that_was_killed_is_none(tmp_path):
    write(tmp_path, 10)
    (layout.path_of(tmp_path, 20)).mkdir()
    (layout.path_of(tmp_path, 20) / "__0_0.distcp").write_bytes(b"half")
    assert integrity.newest_good(tmp_path) == 10


@pytest.mark.parametrize("left", ["", "2\x00"])
def test_tracker_cut_short(tmp_path, left):
    write(tmp_path, 10)
    write(tmp_path, 20)
    (tmp_path / layout.TRACKER).write_text(left)
    assert integrity.newest_good(tmp_path) == 20
    assert layout.tracked_iteration(tmp_path) == 20


def test_tracker_is_obeyed(tmp_path):
    """Someone wants to go back: newer checkpoints do not count."""
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    layout.write_tracker(tmp_path, 10)
    assert integrity.newest_good(tmp_path) == 10
    (tmp_path / layout.TRACKER).write_text("release")
    assert integrity.newest_good(tmp_path) is None


def test_without_manifest_it_is_loaded_unchecked(tmp_path, caplog):
    write(tmp_path, 10, manifest=False)
    assert integrity.newest_good(tmp_path) == 10
    assert "no manifest" in caplog.text


def test_megatron_reads_our_manifest(tmp_path):
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    path = write(tmp_path, 10)
    verify_integrity_manifest(str(path))
    flip_a_bit(path / "__0_0.distcp")
    with pytest.raises(CheckpointingException, match="hash mismatch"):
        verify_integrity_manifest(str(path))


def test_extra_files_are_in_the_manifest(tmp_path):
    path = write(tmp_path, 10, manifest=False)
    integrity.write_manifest(path, {"guard.json": "{}"})
    assert "guard.json" in json.loads((path / "integrity.json").read_text())["files"]
    (path / "guard.json").write_text("[]")
    assert "guard.json" in integrity.find_corruption(path)


def _two_processes(run: str) -> tuple:
    import torch.distributed as dist

    path = layout.path_of(Path(run), 10)
    if dist.get_rank() == 0:
        write(Path(run), 20, manifest=False)
    dist.barrier()
    integrity.write_manifest(layout.path_of(Path(run), 20))
    good = integrity.newest_good(run)
    dist.barrier()
    if dist.get_rank() == 1:
        flip_a_bit(layout.path_of(Path(run), 20) / "__2_0.distcp")
    dist.barrier()
    return good, integrity.newest_good(run), integrity.find_corruption(path)


def test_processes_share_the_work_and_agree(tmp_path):
    path = write(tmp_path, 10)
    assert run_world(2, _two_processes, str(tmp_path)) == [(20, 10, None)] * 2
    alone = json.loads((path / "integrity.json").read_text())
    together = json.loads((layout.path_of(tmp_path, 20) / "integrity.json").read_text())
    assert alone["files"].keys() == together["files"].keys() and len(together["files"]) == 5
    assert set(together["sizes"].values()) == {10_000, 100, 33}


def _unreadable(run: str) -> str:
    path = Path(run) / "iter_0000010"
    (path / "gone").symlink_to("nowhere")
    try:
        integrity._hash_of(path / "gone")
    except OSError as error:
        return type(error).__name__
    return "read"


def test_error_of_one_process_reaches_all(tmp_path, monkeypatch):
    path = write(tmp_path, 10, manifest=False)
    assert _unreadable(str(tmp_path)) == "FileNotFoundError"
    real = integrity._hash_of
    monkeypatch.setattr(
        integrity, "_hash_of", lambda file: real(path / "gone") if file.name == "__1_0.distcp" else real(file)
    )
    with pytest.raises(OSError, match="cannot be read back"):
        integrity.write_manifest(path)
    assert not (path / "integrity.json").exists()


def test_pruning(tmp_path):
    assert pruning.surplus([10, 20, 30, 40], 40, keep=2, keep_every=None) == [20, 10]
    assert pruning.surplus([10, 20, 30, 40], 40, keep=1, keep_every=20) == [30, 10]
    assert pruning.surplus([10, 20, 30, 40], 30, keep=1, keep_every=None) == [20, 10], "newer ones are not ours"
    for iteration in (10, 20, 30):
        write(tmp_path, iteration)
    assert pruning.remove_surplus(tmp_path, 2, None) == [10]
    assert layout.iterations(tmp_path) == [30, 20] and not layout.path_of(tmp_path, 10).exists()


def test_nothing_is_removed_while_the_newest_has_no_manifest(tmp_path):
    for iteration in (10, 20):
        write(tmp_path, iteration)
    write(tmp_path, 30, manifest=False)
    assert pruning.remove_surplus(tmp_path, 1, None) == []


def test_checkpoint_outside_is_not_removed(tmp_path):
    """A link to someone else's checkpoint stays, and so does what it points to."""
    outside = write(tmp_path / "elsewhere", 5)
    (tmp_path / "run").mkdir()
    layout.path_of(tmp_path / "run", 5).symlink_to(outside)
    write(tmp_path / "run", 10)
    pruning.remove_surplus(tmp_path / "run", 1, None)
    assert (outside / "metadata.json").exists()
