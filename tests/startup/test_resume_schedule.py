"""A schedule beside a checkpoint, and the checkpoint that must be there, without a run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing

from yoco_megatron.checkpoint.architecture import check_checkpoint_exists
from yoco_megatron.checkpoint.layout import path_of, write_tracker
from yoco_megatron.startup import arguments, record, resume_schedule

pytestmark = pytest.mark.usefixtures("one_process")
RUN = [
    *("--config", "configs/model/yoco_tiny.yaml", "--mock-data", "--tokenizer-type", "NullTokenizer"),
    *("--vocab-size", "100", "--seq-length", "32", "--micro-batch-size", "1", "--train-iters", "8", "--lr", "1e-3"),
]


def start(folder: Path, *flags: str) -> None:
    """What a run of eight steps leaves of its schedule at the fourth."""
    args = arguments.parse([*RUN, *flags])
    args.global_batch_size = args.global_batch_size or 1
    schedule_of_run = {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_decay_style": args.lr_decay_style,
        "lr_decay_steps": args.train_iters * args.global_batch_size,
        "lr_warmup_steps": 0,
        "wd_incr_style": args.weight_decay_incr_style,
        "start_wd": args.start_weight_decay or args.weight_decay,
        "end_wd": args.end_weight_decay or args.weight_decay,
    }
    checkpoint = path_of(folder, 4)
    checkpoint.mkdir(parents=True)
    dist_checkpointing.save({"iteration": 4, "args": args, "opt_param_scheduler": schedule_of_run}, str(checkpoint))
    write_tracker(folder, 4)


def resume(folder: Path, *flags: str, processes: int | None = None) -> None:
    resume_schedule.check_resumable(arguments.parse([*RUN, "--load", str(folder), *flags], processes))


def test_a_batch_that_is_not_said(tmp_path: Path) -> None:
    """Nobody knows then how long the run is in samples."""
    start(tmp_path, "--global-batch-size", "2")
    resume(tmp_path)
    with pytest.raises(ValueError, match=r"--lr was 0\.001, is 0\.002"):
        resume(tmp_path, "--lr", "2e-3")


def test_a_batch_that_is_another(tmp_path: Path) -> None:
    start(tmp_path, "--global-batch-size", "2")
    resume(tmp_path, "--global-batch-size", "2")
    with pytest.raises(ValueError, match=r"samples .* was 16, is 32"):
        resume(tmp_path, "--global-batch-size", "4")


def test_the_checkpoint_counts_and_not_the_run_that_was_started_last(tmp_path: Path) -> None:
    """Its config lies beside, with another rate, if it crashed before its first save."""
    start(tmp_path)
    record.save_resolved_config(arguments.parse([*RUN, "--lr", "2e-3"]), tmp_path)
    resume(tmp_path)
    with pytest.raises(ValueError, match=r"--lr was 0\.001, is 0\.002"):
        resume(tmp_path, "--lr", "2e-3")
    resume(tmp_path, "--lr", "2e-3", "--override-opt_param-scheduler")


@pytest.mark.parametrize("put", [lambda path: None, Path.mkdir, os.mkfifo])
def test_a_damaged_checkpoint_is_passed_over(put: Callable[[Path], None], tmp_path: Path) -> None:
    """As loading does; the one before counts. A pipe is not waited for."""
    start(tmp_path)
    path_of(tmp_path, 6).mkdir()
    put(path_of(tmp_path, 6) / "metadata.json")
    write_tracker(tmp_path, 6)
    resume(tmp_path)
    with pytest.raises(ValueError, match=r"--lr was 0\.001, is 0\.002"):
        resume(tmp_path, "--lr", "2e-3")


DECAYS = ["--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1", "--end-weight-decay"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*DECAYS, "0.3"], "--end-weight-decay was 0.2, is 0.3"),
        (["--weight-decay", "0.3"], "--weight-decay-incr-style was linear, is constant"),
        ([*DECAYS, "0.2", "--decoupled-lr", "2e-3"], "--decoupled-lr was None, is 0.002"),
    ],
)
def test_rates_and_decays(flags: list[str], said: str, tmp_path: Path) -> None:
    start(tmp_path, *DECAYS, "0.2")
    resume(tmp_path, *DECAYS, "0.2")
    with pytest.raises(ValueError, match=said):
        resume(tmp_path, *flags)


def test_a_checkpoint_without_its_optimizer(tmp_path: Path) -> None:
    path_of(tmp_path, 4).mkdir()
    dist_checkpointing.save({"iteration": 4, "args": arguments.parse(RUN)}, str(path_of(tmp_path, 4)))
    write_tracker(tmp_path, 4)
    with pytest.raises(ValueError, match="iteration 4 was saved without its optimizer: add --no-load-optim"):
        resume(tmp_path, "--override-opt_param-scheduler")
    resume(tmp_path, "--no-load-optim")


def test_a_fresh_start_names_one_folder(tmp_path: Path) -> None:
    """However its path is written; another one must hold a checkpoint."""
    check_checkpoint_exists(arguments.parse([*RUN, "--save", str(tmp_path), "--load", f"{tmp_path}/"]))
    with pytest.raises(ValueError, match="holds no checkpoint"):
        check_checkpoint_exists(arguments.parse([*RUN, "--save", str(tmp_path), "--load", f"{tmp_path}2"]))


def test_an_optimizer_that_is_another(tmp_path: Path) -> None:
    experts = (
        "--optimizer",
        "muon",
        "--bf16",
        "--num-experts",
        "4",
        "--moe-router-topk",
        "2",
        "--moe-aux-loss-coeff",
        "0",
    )
    start(tmp_path, "--global-batch-size", "2", *experts)
    resume(tmp_path, *experts)
    resume(tmp_path, *experts, "--use-distributed-optimizer")
    with pytest.raises(ValueError, match="with --optimizer muon, whose state --optimizer adam cannot use"):
        resume(tmp_path)
    with pytest.raises(ValueError, match="with --muon-scalar-optimizer adam, whose state --muon-scalar-optimizer lion"):
        resume(tmp_path, *experts, "--muon-scalar-optimizer", "lion")
    resume(tmp_path, "--no-load-optim")
    with pytest.raises(
        ValueError, match=r"with no experts divided .*, and this run has experts divided .*, without --use"
    ):
        resume(
            tmp_path,
            *experts,
            "--expert-tensor-parallel-size",
            "1",
            "--tensor-model-parallel-size",
            "2",
            "--sequence-parallel",
            processes=2,
        )
