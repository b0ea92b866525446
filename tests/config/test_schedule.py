"""A schedule beside a checkpoint, and the checkpoint that must be there, without a run."""

from pathlib import Path

import pytest

from yoco_megatron.checkpoint.architecture import check_there
from yoco_megatron.checkpoint.folder import write_tracker
from yoco_megatron.config import arguments, schedule

RUN = [
    *("--config", "configs/model/yoco_tiny.yaml", "--mock-data", "--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "100", "--seq-length", "32", "--micro-batch-size", "1", "--train-iters", "8", "--lr", "1e-3"),
]


def start(folder: Path, *flags: str):
    args = arguments.parse([*RUN, *flags])
    arguments.save_resolved_config(args, folder)
    write_tracker(folder, 4)


def resume(folder: Path, *flags: str) -> None:
    schedule.check_resumable(arguments.parse([*RUN, "--load", str(folder), *flags]), arguments.build_parser)


def test_a_batch_that_was_not_said(tmp_path: Path) -> None:
    """Nobody knows then how long the run was in samples."""
    start(tmp_path)
    resume(tmp_path, "--global-batch-size", "1")
    with pytest.raises(ValueError, match=r"--lr was 0\.001, is 0\.002"):
        resume(tmp_path, "--global-batch-size", "1", "--lr", "2e-3")


def test_a_batch_that_is_another(tmp_path: Path) -> None:
    start(tmp_path, "--global-batch-size", "2")
    with pytest.raises(ValueError, match=r"samples .* was 16, is 32"):
        resume(tmp_path, "--global-batch-size", "4")


def test_a_fresh_start_names_one_folder(tmp_path: Path) -> None:
    """However its path is written; another one must hold a checkpoint."""
    check_there(arguments.parse([*RUN, "--save", str(tmp_path), "--load", f"{tmp_path}/"]))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        check_there(arguments.parse([*RUN, "--save", str(tmp_path), "--load", f"{tmp_path}2"]))
