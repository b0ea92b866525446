"""What was saved with tensor and pipeline parallelism goes on with context or data parallelism, as if undisturbed.

Runs share their processes (`support.cli.Runs`); the same on GPUs is tests/gpu/test_meshes.py. Tolerance: fp32 sums in
another order, 2e-6 of the loss in ten steps, 1e-5 where a checkpoint lies between (test_pipeline_training.py).
"""

from pathlib import Path

import pytest
from support.cli import TINY, Runs, train

from benchmarks.mesh import Mesh

SAVED, LOADED = "TP2xPP2xDP2", ("CP8", "DP8", "TP2xCP4")
HALF, WHOLE = 2, 4
FLAGS = (
    *TINY,
    "--micro-batch-size",
    "1",
    "--train-iters",
    str(WHOLE),
    "--use-distributed-optimizer",
    "--eval-iters",
    "0",
)


@pytest.mark.slow
def test_saved_at_one_mesh_continued_at_others(tmp_path: Path) -> None:
    def flags(mesh: str, *more: str) -> list[str]:
        return [*FLAGS, *Mesh.of(mesh).flags.split(), *more]

    gpus = Mesh.of(SAVED).gpus
    load = ("--load", str(tmp_path), "--ckpt-step", str(HALF))
    runs = Runs(
        gpus,
        {SAVED: flags(SAVED, "--save", str(tmp_path), "--save-interval", str(HALF))}
        | {mesh: flags(mesh, *load) for mesh in LOADED}
        | {"too many": flags(f"CP{gpus}", "--tensor-model-parallel-size", "2")},
        timeout=480,
    )
    whole, alone = runs[SAVED], train(1, *FLAGS)
    for step in alone.losses:
        assert whole.loss(step) == pytest.approx(alone.loss(step), rel=2e-6), step
    for mesh in LOADED:
        log = runs[mesh]
        assert list(log.grad_norms) == list(range(HALF + 1, WHOLE + 1)), "did not start from the checkpoint"
        for step in log.losses:
            assert log.loss(step) == pytest.approx(whole.loss(step), rel=1e-5), (mesh, step)
    with pytest.raises(AssertionError, match=f"{gpus} processes cannot be divided"):
        runs["too many"]
