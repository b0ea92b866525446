"""Gated memory units from the command line, with multi-token prediction: a checkpoint knows no cuts of a pipeline.

Tolerance: fp32 sums in another order, 2e-6 of the losses in six steps, 1e-5 where a checkpoint lies between
(test_meshes.py).
"""

from pathlib import Path

import pytest
from support.cli import TINY, Runs

MODEL = (
    "--num-layers",
    "6",
    "--self-decoder-pattern",
    "RRS",
    "--cross-decoder-pattern",
    "GAG",
    "--mtp-num-layers",
    "1",
)
FLAGS = (*TINY, *MODEL, "--micro-batch-size", "1", "--train-iters", "6", "--use-distributed-optimizer")
PP2 = ("--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Ett|ttttL")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--recompute-granularity", "full")
TP2 += ("--recompute-method", "block", "--recompute-num-layers", "2")


def test_two_processes(tmp_path: Path) -> None:
    saved, loaded = ("--save", str(tmp_path), "--save-interval", "3"), ("--load", str(tmp_path), "--ckpt-step", "3")
    alone = Runs(1, {"alone": FLAGS})["alone"]
    runs = Runs(2, {"PP2": (*FLAGS, *PP2, *saved), "TP2 SP": (*FLAGS, *TP2, *loaded)})
    for step in alone.losses:
        assert runs["PP2"].loss(step) == pytest.approx(alone.loss(step), rel=2e-6), step
    assert list(runs["TP2 SP"].grad_norms) == [4, 5, 6], "did not start from the checkpoint"
    for step in runs["TP2 SP"].losses:
        assert runs["TP2 SP"].loss(step) == pytest.approx(alone.loss(step), rel=1e-5), step
