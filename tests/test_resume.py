"""A run that was interrupted is the run that was not: through `pretrain_yoco.main`, in fresh processes, on disk.

At the same mesh equal means bitwise: losses, gradient norms and validation losses as printed, and every tensor of the
last checkpoint (weights, optimizer, states of Megatron's random generators). At another mesh sums run in another order:
losses of the six following steps agree within 2e-5 relative, a few fp32 roundings grown by six steps of Adam.

Dropout is for the run with sequence parallelism alone, where it draws from Megatron's generators. Elsewhere it draws
from the device's, which on a CPU also gives the data loaders their seeds whenever they start, after a resume once more.
"""

import re
from pathlib import Path

import pytest
import torch
from support.cli import STEP, TINY, TINY_BASELINE, TINY_WINDOWS, Log, checkpoint, train

from yoco_megatron.checkpoint.common_state import common_state, param_groups

HALF, WHOLE = 6, 12
TOLERANCE = 2e-5
DISTRIBUTED = ["--use-distributed-optimizer"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]

# The device's own random state, see above.
DEVICE_STATES = ("/torch_rng_state", "/cuda_rng_state")

# name -> (processes, flags)
RUNS: dict[str, tuple[int, list[str]]] = {
    "fp32": (1, []),
    "bf16, distributed optimizer": (1, ["--bf16", *DISTRIBUTED]),
    "fp32, distributed optimizer, windows, two workers": (1, [*DISTRIBUTED, *TINY_WINDOWS, "--num-workers", "2"]),
    "transformer, bf16": (1, ["--architecture", "transformer", "--bf16"]),
    "TP2, bf16, distributed optimizer, dropout": (2, ["--bf16", *TP2, *DISTRIBUTED, "--hidden-dropout", "0.1"]),
}
QUICK = ["fp32", "bf16, distributed optimizer"]
# Saved at one mesh, to be loaded at another.
MESHES: dict[str, tuple[int, list[str]]] = {"TP2": (2, TP2), "DP2, distributed optimizer": (2, DISTRIBUTED)}


def base_of(flags: list[str]) -> list[str]:
    """What `flags` are added to."""
    return [*(TINY_BASELINE if "transformer" in flags else TINY), "--train-iters", str(WHOLE)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """name -> (log, folder) of a run that is not interrupted, with checkpoints of its middle and its end."""
    done: dict[str, tuple[Log, Path]] = {}

    def run(name: str) -> tuple[Log, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            processes, flags = (RUNS | MESHES)[name]
            saving = ("--save", str(folder), "--save-interval", str(HALF))
            done[name] = train(processes, *flags, *saving, base=base_of(flags)), folder
        return done[name]

    return run


def resume(processes: int, flags: list[str], folder: Path, *more: str) -> Log:
    """The second half of a run, from the checkpoint of its middle in `folder`."""
    log = train(processes, *flags, "--load", str(folder), "--ckpt-step", str(HALF), *more, base=base_of(flags))
    assert list(log.grad_norms) == list(range(HALF + 1, WHOLE + 1)), "did not start from the checkpoint"
    return log


def tensors(tree, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested checkpoint by their path."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: v for key, value in items for k, v in tensors(value, f"{path}/{key}").items()}


def assert_same_run(log: Log, whole: Log) -> None:
    """The second half's figures are the undisturbed run's, to the last printed digit."""
    assert len(log.losses) == WHOLE - HALF
    for step, loss in log.losses.items():
        assert loss == whole.losses[step], f"step {step}"
    assert log.grad_norms == {step: norm for step, norm in whole.grad_norms.items() if step > HALF}
    assert log.validation == whole.validation and len(log.validation) == 2


def assert_same_checkpoint(found: dict, expected: dict) -> None:
    ours, wanted = tensors(found), tensors(expected)
    assert ours.keys() == wanted.keys() and any("exp_avg_sq" in key for key in ours)
    different = [key for key, value in wanted.items() if not torch.equal(ours[key], value)]
    different = [key for key in different if not key.endswith(DEVICE_STATES)]
    assert not different, f"{len(different)} of {len(wanted)} tensors differ: {different[:5]}"


def learning_rates(log: Log) -> dict[int, float]:
    return {int(step): float(rate) for step, rate in re.findall(rf"{STEP} .*? lr (\S+) ", log.text)}


def assert_close_run(log: Log, whole: Log) -> None:
    for step in log.losses:
        assert log.loss(step) == pytest.approx(whole.loss(step), rel=TOLERANCE), f"step {step}"


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_resumed_run_is_bitwise_the_undisturbed_one(name, undisturbed, tmp_path):
    whole, folder = undisturbed(name)
    assert whole.loss(WHOLE) < 0.85 * whole.loss(1), "it learns something"
    log = resume(*RUNS[name], folder, "--save", str(tmp_path), "--save-interval", str(WHOLE))
    assert_same_run(log, whole)
    assert_same_checkpoint(checkpoint(tmp_path, WHOLE), checkpoint(folder, WHOLE))


def test_without_its_optimizer_it_is_another_run(undisturbed):
    """The comparison above sees it when something is not restored."""
    whole, folder = undisturbed("fp32")
    log = resume(*RUNS["fp32"], folder, "--no-load-optim")
    assert log.losses[HALF + 1] == whole.losses[HALF + 1]  # the weights are the same, the first step is not
    assert all(log.losses[step] != whole.losses[step] for step in range(HALF + 2, WHOLE + 1))
    with pytest.raises(AssertionError):
        assert_close_run(log, whole)


@pytest.mark.parametrize(
    ("saved", "processes", "flags"),
    [
        pytest.param("fp32", 2, TP2, id="TP1 to TP2"),
        pytest.param("TP2", 1, [], id="TP2 to TP1", marks=pytest.mark.slow),
        pytest.param("fp32", 2, [], id="DP1 to DP2", marks=pytest.mark.slow),
        pytest.param("DP2, distributed optimizer", 1, DISTRIBUTED, id="DP2 to DP1, distributed optimizer"),
        pytest.param(
            "DP2, distributed optimizer",
            2,
            [*TP2, *DISTRIBUTED],
            id="DP2 to TP2, distributed optimizer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_checkpoint_of_another_mesh(saved, processes, flags, undisturbed):
    """Weights, optimizer and place in the data fit a mesh that they were not saved at."""
    whole, folder = undisturbed(saved)
    assert_close_run(resume(processes, flags, folder), whole)


def test_asynchronous_save(undisturbed, tmp_path):
    """Steps are made while a checkpoint is written, and it holds what was there before them."""
    name = "bf16, distributed optimizer"
    (_, flags), (whole, folder) = RUNS[name], undisturbed(name)
    saving = [*flags, "--async-save", "--save", str(tmp_path), "--save-interval", str(HALF)]
    first = train(1, *saving, "--exit-interval", str(HALF + 2), base=base_of(flags))
    assert first.losses == {step: loss for step, loss in whole.losses.items() if step <= HALF + 2}
    said = ["scheduled an async checkpoint save at iteration       6", "  7/", "successfully saved"]
    places = [first.text.index(text) for text in said]
    assert places == sorted(places), "the step after it did not wait"
    assert_same_checkpoint(checkpoint(tmp_path, HALF), checkpoint(folder, HALF))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(HALF + 2)
    second = train(1, *saving, "--load", str(tmp_path), "--ckpt-step", str(HALF), base=base_of(flags))
    assert_same_run(second, whole)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(WHOLE)


TWICE = ["--lr", "2e-2", "--min-lr", "2e-4"]  # of TINY's


@pytest.mark.parametrize("name", QUICK)
def test_another_learning_rate_when_told(name, undisturbed, tmp_path):
    """--override-opt_param-scheduler: the same weights and moments go on at the new rate, and are saved with it."""
    whole, folder = undisturbed(name)
    saving = ["--save", str(tmp_path), "--save-interval", "3"]
    faster = resume(*RUNS[name], folder, *TWICE, "--override-opt_param-scheduler", *saving)
    assert faster.losses[HALF + 1] == whole.losses[HALF + 1]  # before its first step at the new rate
    assert all(faster.losses[step] != whole.losses[step] for step in range(HALF + 2, WHOLE + 1))
    want = {step: 2 * rate for step, rate in learning_rates(whole).items() if step > HALF}
    assert learning_rates(faster) == pytest.approx(want, rel=1e-2)  # printed with three digits
    assert len(want) == WHOLE - HALF
    processes, flags = RUNS[name]
    again = train(processes, *flags, *TWICE, "--load", str(tmp_path), "--ckpt-step", "9", base=base_of(flags))
    assert list(again.grad_norms) == list(range(10, WHOLE + 1))
    assert again.grad_norms == {step: norm for step, norm in faster.grad_norms.items() if step > 9}


def test_the_checkpoints_learning_rate_when_told(undisturbed):
    whole, folder = undisturbed("fp32")
    log = resume(*RUNS["fp32"], folder, *TWICE, "--use-checkpoint-opt_param-scheduler")
    assert_same_run(log, whole)
    assert learning_rates(log) == {step: rate for step, rate in learning_rates(whole).items() if step > HALF}


def test_rates_of_their_own(tmp_path):
    """Groups change each to its own flag, also where the old rates were equal, and a new one is another's old one."""
    groups = ["--untie-embeddings-and-output-weights", "--decoupled-lr", "1e-2", "--decoupled-min-lr", "1e-3"]
    first = train(
        1,
        *groups,
        "--save",
        str(tmp_path),
        "--save-interval",
        str(HALF),
        "--exit-interval",
        str(HALF),
        base=base_of([]),
    )
    now = ["--lr", "5e-3", "--decoupled-lr", "2e-2", "--override-opt_param-scheduler"]
    log = resume(1, [*groups, *now], tmp_path, "--save", str(tmp_path), "--save-interval", "6")
    assert len(first.losses) == HALF and log.losses
    common = common_state(tmp_path / "iter_0000012")
    rates = sorted((group["max_lr"], group["min_lr"]) for group in param_groups(common["optimizer"]))
    assert rates[-1] == (2e-2, 1e-3) and set(rates[:-1]) == {(5e-3, 1e-4)}
    back = train(
        1, *groups, "--lr", "2e-2", "--decoupled-lr", "5e-3", *now[-1:], "--load", str(tmp_path), base=base_of([])
    )
    assert not back.losses  # all steps are done: it is loaded


def test_the_checkpoints_weight_decay_when_told(undisturbed):
    """From the first step on."""
    whole, folder = undisturbed("fp32")
    assert_same_run(
        resume(*RUNS["fp32"], folder, "--weight-decay", "0.9", "--use-checkpoint-opt_param-scheduler"), whole
    )
