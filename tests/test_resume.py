"""A run that was interrupted is the run that was not: through `pretrain_yoco.main`, in fresh processes, on disk.

At the same mesh equal means bitwise: the losses, gradient norms and validation losses as printed, and every tensor of
the last checkpoint (weights, optimizer moments, random states). At another mesh sums run in another order: losses of
the ten following steps agree within 2e-5 relative, a few fp32 roundings grown by ten steps of Adam.
"""

from pathlib import Path

import pytest
import torch
from support.cli import Log, checkpoint, train

HALF, WHOLE = 10, 20
TOLERANCE = 2e-5
DISTRIBUTED = ["--use-distributed-optimizer"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
DROPOUT = ["--hidden-dropout", "0.1"]
WINDOWS = ["--self-decoder", "sliding_window"]

# name -> (processes, flags)
RUNS: dict[str, tuple[int, list[str]]] = {
    "fp32": (1, []),
    "bf16, distributed optimizer, dropout": (1, ["--bf16", *DISTRIBUTED, *DROPOUT]),
    "fp32, distributed optimizer, windows": (1, [*DISTRIBUTED, *WINDOWS]),
    "bf16, windows, dropout": (1, ["--bf16", *WINDOWS, *DROPOUT]),
    "transformer, bf16, distributed optimizer": (1, ["--architecture", "transformer", "--bf16", *DISTRIBUTED]),
    "TP2": (2, TP2),
    "DP2, distributed optimizer": (2, DISTRIBUTED),
    "TP2, bf16, distributed optimizer, dropout": (2, ["--bf16", *TP2, *DISTRIBUTED, *DROPOUT]),
}
QUICK = ["fp32", "bf16, distributed optimizer, dropout"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """name -> (log, folder) of a run of 20 steps that is not interrupted; its checkpoints are those of steps 10 and 20."""
    done: dict[str, tuple[Log, Path]] = {}

    def run(name: str) -> tuple[Log, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            processes, flags = RUNS[name]
            done[name] = train(processes, *flags, "--save", str(folder), "--save-interval", str(HALF)), folder
        return done[name]

    return run


def resume(name: str, folder: Path, *more: str) -> Log:
    """Steps 11 to 20 of the run `name`, from the checkpoint of step 10 in `folder`."""
    processes, flags = RUNS[name]
    log = train(processes, *flags, "--load", str(folder), "--ckpt-step", str(HALF), *more)
    assert list(log.losses) == list(range(HALF + 1, WHOLE + 1)), "did not start from the checkpoint"
    return log


def tensors(tree, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested checkpoint by their path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{path}/{key}").items()}


def assert_same_run(log: Log, whole: Log) -> None:
    """The second half's figures are the undisturbed run's, to the last printed digit."""
    assert log.losses == {step: loss for step, loss in whole.losses.items() if step > HALF}
    assert log.grad_norms == {step: norm for step, norm in whole.grad_norms.items() if step > HALF}
    assert log.validation == whole.validation and len(log.validation) == 2


def assert_close_run(log: Log, whole: Log) -> None:
    for step in log.losses:
        assert log.loss(step) == pytest.approx(whole.loss(step), rel=TOLERANCE), f"step {step}"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_resumed_run_is_bitwise_the_undisturbed_one(name, undisturbed, tmp_path):
    whole, folder = undisturbed(name)
    assert whole.loss(WHOLE) < whole.loss(1) / 2, "it learns something"
    log = resume(name, folder, "--save", str(tmp_path), "--save-interval", str(WHOLE))
    assert_same_run(log, whole)
    ours, wanted = tensors(checkpoint(tmp_path, WHOLE)), tensors(checkpoint(folder, WHOLE))
    assert ours.keys() == wanted.keys() and any("exp_avg_sq" in key for key in ours)
    different = [key for key, value in wanted.items() if not torch.equal(ours[key], value)]
    assert not different, f"{len(different)} of {len(wanted)} tensors differ: {different[:5]}"


def test_without_its_optimizer_it_is_another_run(undisturbed):
    """The comparison above sees it when something is not restored."""
    whole, folder = undisturbed("fp32")
    log = resume("fp32", folder, "--no-load-optim")
    assert log.losses[HALF + 1] == whole.losses[HALF + 1]  # the weights are the same, the first step is not
    assert all(log.losses[step] != whole.losses[step] for step in range(HALF + 2, WHOLE + 1))
    with pytest.raises(AssertionError):
        assert_close_run(log, whole)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ("fp32", "TP2"),
        pytest.param("TP2", "fp32", marks=pytest.mark.slow),
        pytest.param("fp32", "DP2, distributed optimizer", marks=pytest.mark.slow),
    ],
)
def test_checkpoint_of_another_mesh(saved, loaded, undisturbed):
    """Tensor parallelism changes, optimizer included."""
    whole, folder = undisturbed(saved)
    if "distributed optimizer" in loaded and "distributed optimizer" not in saved:
        pytest.skip("covered below: the kinds of optimizer hold their state differently")
    assert_close_run(resume(loaded, folder), whole)


def test_distributed_optimizer_of_two_processes_resumes_in_one(undisturbed):
    whole, folder = undisturbed("DP2, distributed optimizer")
    processes, flags = RUNS["DP2, distributed optimizer"]
    log = train(processes // 2, *flags, "--load", str(folder), "--ckpt-step", str(HALF))
    assert list(log.losses) == list(range(HALF + 1, WHOLE + 1))
    assert_close_run(log, whole)


def test_asynchronous_save(undisturbed, tmp_path):
    """A run stopped by --exit-interval whose checkpoint was written in the background."""
    whole, _ = undisturbed("fp32")
    first = train(1, "--async-save", "--save", str(tmp_path), "--exit-interval", str(HALF))
    assert list(first.losses) == list(range(1, HALF + 1))
    assert first.losses == {step: loss for step, loss in whole.losses.items() if step <= HALF}
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(HALF)
    second = train(1, "--async-save", "--save", str(tmp_path), "--load", str(tmp_path))
    assert_same_run(second, whole)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(WHOLE)
