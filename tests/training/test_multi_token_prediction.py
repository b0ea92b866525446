"""Multi-token prediction from the command line: meshes, checkpoints, a loss at some positions, evaluation, refusals.

Runs share their processes (`support.cli.Runs`). Tolerance: fp32 sums in another order, 2e-6 of the losses in six steps,
1e-5 where a checkpoint lies between (test_meshes.py).
"""

import shutil
from pathlib import Path

import pytest
from support.cli import TINY, TINY_BASELINE, Log, Runs

from yoco_megatron.convert.readers import open_source
from yoco_megatron.startup import arguments

FLAGS = (*TINY, "--mtp-num-layers", "1", "--micro-batch-size", "1", "--train-iters", "6", "--use-distributed-optimizer")
SUFFIX = ("--loss-suffix", "8")
HALF = 3
TERMS = ("lm loss", "mtp_1 loss")


def losses(log: Log) -> dict[tuple[str, int], float]:
    """(term, step) -> loss; under -1, -2 those of the evaluations at the end."""
    return {(term, step): loss for term in TERMS for step, loss in log.of_term(term).items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    runs = Runs(
        1,
        {
            "whole": FLAGS,
            "suffix": (*FLAGS, *SUFFIX),
            "suffix, all computed": (*FLAGS, *SUFFIX, "--cross-decoder-positions", "all"),
        },
    )
    return {name: losses(runs[name]) for name in ("whole", "suffix", "suffix, all computed")}


def test_where_there_is_no_loss_nothing_is_computed(alone: dict[str, dict]) -> None:
    assert alone["suffix"] == pytest.approx(alone["suffix, all computed"], rel=2e-6)
    assert alone["suffix"] != pytest.approx(alone["whole"], rel=1e-3)
    assert all(alone["whole"]["mtp_1 loss", step] != alone["whole"]["lm loss", step] for step in range(1, 7))


def test_two_processes(alone: dict[str, dict], tmp_path: Path) -> None:
    pp2 = ("--pipeline-model-parallel-size", "2")
    tp2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    load = ("--load", str(tmp_path), "--ckpt-step", str(HALF))
    meshes = {
        "PP2, planned": (*pp2, "--save", str(tmp_path), "--save-interval", str(HALF)),
        "CP2, suffix": ("--context-parallel-size", "2", *SUFFIX),
        "PP2 VP2, suffix": (*pp2, "--pipeline-model-parallel-layout", "Et|t|t|tmL", *SUFFIX),
        "TP2, loaded": (*tp2, *load),
        "DP2, loaded": load,
    }
    runs = Runs(2, {name: (*FLAGS, *flags) for name, flags in meshes.items()})
    exported = open_source("megatron", str(tmp_path))
    assert "model.mtp_layers.0.proj.weight" in exported.dtypes and exported.config.mtp_num_layers == 1
    for name in meshes:
        found = losses(runs[name])
        wanted = alone["suffix" if name.endswith("suffix") else "whole"]
        if name.endswith("loaded"):
            assert (TERMS[1], HALF + 1) in found and (TERMS[1], HALF) not in found
            assert found == pytest.approx({key: wanted[key] for key in found}, rel=1e-5), name
        else:
            assert found == pytest.approx(wanted, rel=2e-6), name


@pytest.mark.parametrize("optimizer", [["--bf16", "--use-distributed-optimizer"], []], ids=["distributed", "plain"])
def test_a_checkpoint_gains_and_loses_layers(optimizer: list[str], tmp_path: Path) -> None:
    """A new layer of hardly any weight in the loss changes nothing else, optimizer state included. It begins with what
    it begins with when no optimizer state is loaded, and can be left out again."""
    before, after = tmp_path / "before", tmp_path / "after"
    plain = (*TINY, "--micro-batch-size", "1", "--train-iters", "6", *optimizer)
    faint = ("--mtp-num-layers", "1", "--mtp-loss-scaling-factor", "1e-9")
    load = ("--load", str(before), "--ckpt-step", str(HALF))
    runs = Runs(
        1,
        {
            "without": (*plain, "--save", str(before), "--save-interval", str(HALF)),
            "gains": (*plain, *faint, *load, "--save", str(after), "--save-interval", "5"),
            "gains, another optimizer state": (*plain, *faint, *load, "--no-load-optim"),
            "loses": (*plain, "--mtp-num-layers", "0", "--load", str(after), "--ckpt-step", "5"),
        },
    )
    wanted = runs["without"].of_term("lm loss")
    for name, first in (("gains", 4), ("loses", 6)):
        found = runs[name].of_term("lm loss")
        assert min(step for step in found if step > 0) == first
        assert found == pytest.approx({step: wanted[step] for step in found}, rel=1e-5), name
    mtp, of_other = (runs[name].of_term(TERMS[1]) for name in ("gains", "gains, another optimizer state"))
    assert mtp[4] == of_other[4] and mtp[6] < mtp[4]
    assert f"WARNING: --mtp-num-layers: the checkpoint {before}/iter_0000003 lacks mtp_1: " in runs["gains"].text
    assert f"{after}/iter_0000005 has mtp_1: they are left out" in runs["loses"].text
    shutil.copytree(before / "iter_0000003", after / "iter_0000003")  # as if it had been saved there
    assert [open_source("megatron", str(after), step).config.mtp_num_layers for step in (3, 5)] == [0, 1]
    with pytest.raises(ValueError, match=r"mtp-num-layers is 1 there, 0 here.*--mtp-num-layers 0 goes on without"):
        arguments.parse([*plain, "--load", str(after)])
    if not optimizer:
        with pytest.raises(ValueError, match=r"has 1 fewer, and without --use-distributed-optimizer.*--no-load-optim"):
            arguments.parse([*plain, *faint, *load, "--bf16"])


def test_the_baseline_has_none() -> None:
    with pytest.raises(ValueError, match="--mtp-num-layers is refused on --architecture transformer"):
        arguments.parse([*TINY_BASELINE, "--mtp-num-layers", "1"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--mtp-num-layers", "64"], "--mtp-num-layers 64 predicts beyond a sequence of --seq-length"),
        (["--mtp-num-layers", "1", "--teacher", "somewhere"], "--teacher is not built for --mtp-num-layers"),
        (["--mtp-num-layers", "2", "--loss-suffix", "2"], "--loss-suffix 2 leaves --mtp-num-layers 2 without a loss"),
        (["--mtp-num-layers", "-1"], "--mtp-num-layers -1 must not be negative"),
        (["--mtp-loss-scaling-factor", "0.5"], "--mtp-loss-scaling-factor has no effect without --mtp-num-layers"),
    ],
)
def test_what_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        arguments.parse([*TINY, *given])
    assert said in str(caught.value) and "\n" not in str(caught.value)
