"""Pipelines through pretrain_yoco.py: the losses of one process, evaluation, ramp-up, and checkpoints that do not know
where stages were cut.

Tolerance: fp32 sums in another order, from equal weights, over ten steps: 2e-6 of the loss (printed with 7 digits).
"""

from pathlib import Path

import pytest
from support.cli import TINY, Log, train

TEN = ("--train-iters", "10")
LOSS = 2e-6
PP2 = ("--pipeline-model-parallel-size", "2")
# Ranks, flags: cuts by the planner, by hand with both decoders on one stage, interleaved, with TP and SP.
MESHES = {
    "PP2 planned": (2, PP2),
    "PP2 by hand": (2, (*PP2, "--pipeline-model-parallel-layout", "Et|tttL")),
    "PP2 VP2": (2, (*PP2, "--num-virtual-stages-per-pipeline-rank", "2")),
    "TP2 PP2 SP distributed optimizer": (
        4,
        (*PP2, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--use-distributed-optimizer"),
    ),
}


def assert_same_losses(log: Log, reference: Log) -> None:
    assert log.losses.keys() == reference.losses.keys()
    for step in reference.losses:
        assert log.loss(step) == pytest.approx(reference.loss(step), rel=LOSS), f"step {step}"
    assert log.validation.keys() == reference.validation.keys()
    for key, value in reference.validation.items():
        assert float(log.validation[key]) == pytest.approx(float(value), rel=LOSS), key


@pytest.fixture(scope="module")
def one_process() -> Log:
    return train(1, *TEN)


@pytest.mark.parametrize("mesh", MESHES)
def test_ten_steps_equal_one_process(mesh: str, one_process: Log) -> None:
    size, flags = MESHES[mesh]
    log = train(size, *TEN, *flags)
    assert len(one_process.losses) >= 9
    assert_same_losses(log, one_process)


def test_batch_size_schedule() -> None:
    """The number of micro-batches changes during the run; the transport plans each call anew."""
    # Five steps of 4 sequences of 32 tokens, then of 8.
    ramp = ("--step-batch-size-schedule", "0:4 640:8", "--train-samples", "60", "--lr-warmup-samples", "8")
    without = {"--train-iters", "--lr-warmup-iters", "--global-batch-size"}
    by_samples = [word for word, before in zip(TINY, ["", *TINY]) if not {word, before} & without]
    reference, log = train(1, *ramp, base=by_samples), train(2, *ramp, *PP2, base=by_samples)
    assert len(reference.losses) == 10, "steps"
    assert_same_losses(log, reference)


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [((), ()), (("--shared-kv-sets", "2"), ("--use-distributed-optimizer",))],
    ids=["adam", "two sets of K,V, distributed optimizer"],
)
def test_checkpoints_do_not_know_the_cuts(model: tuple, optimizer: tuple, tmp_path: Path, one_process: Log) -> None:
    """Saved with four stages after five steps, continued with one process, with two stages cut elsewhere, with TP2."""
    reference = train(1, *TEN, *model) if model else one_process
    save = ("--save", str(tmp_path), "--save-interval", "5")
    train(4, *TEN, *model, *optimizer, *save, "--exit-interval", "5", "--pipeline-model-parallel-size", "4")
    load = (*TEN, *model, *optimizer, "--load", str(tmp_path))
    for size, flags in (
        (1, ()),
        (2, (*PP2, "--pipeline-model-parallel-layout", "Ettt|tL")),
        (2, ("--tensor-model-parallel-size", "2")),
    ):
        log = train(size, *load, *flags)
        assert max(log.losses) == 10
        for step in (8, 9, 10):
            assert log.loss(step) == pytest.approx(reference.loss(step), rel=1e-5), (flags, step)
