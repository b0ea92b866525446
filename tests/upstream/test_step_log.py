"""The lines of a run: which steps' losses they hold, also after a start in the middle of an interval; rates."""

import re
import statistics
from argparse import Namespace

import pytest
from support.cli import Log, _main, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from yoco_megatron.costs.gpu_peak import peak_flops
from yoco_megatron.upstream import step_log
from yoco_megatron.upstream.throughput import Rates

FLAGS = ("--train-iters", "8", "--num-workers", "0", "--eval-iters", "0", "--log-throughput")
MASKED = 7
SHOWN = 1e-6  # of a mean of printed losses


def _without_loss_in_one_step(flags: list[str]) -> None:
    from megatron.training import get_args

    from yoco_megatron.training import step

    original = step.loss_func
    step.loss_func = lambda mask, losses: original(mask * (get_args().curr_iteration + 1 != MASKED), losses)
    _main(flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def each_step(folder) -> Log:
    """A line for each step."""
    return train(1, *FLAGS, "--tensorboard-dir", str(folder / "curves"), entry=_without_loss_in_one_step)


@pytest.fixture(scope="module")
def each_third(folder) -> Log:
    saving = ["--save", str(folder), "--save-interval", "4", "--log-interval", "3"]
    return train(1, *FLAGS, *saving, entry=_without_loss_in_one_step)


def test_each_line_is_its_own_step(each_step, each_third):
    """The first two steps differ, so the mean of them is neither."""
    assert list(each_step.losses) == [1, 2, 3, 4, 5, 6, 8]
    assert list(each_third.losses) == [1, 3, 6]
    assert each_third.losses[1] == each_step.losses[1]
    for last in (3, 6):
        steps = [each_step.loss(step) for step in range(last - 2, last + 1)]
        assert each_third.loss(last) == pytest.approx(statistics.fmean(steps), rel=SHOWN)


def test_line_after_a_resume_in_the_middle_of_an_interval(folder, each_third):
    resumed = train(1, *FLAGS, "--log-interval", "3", "--load", str(folder), "--ckpt-step", "4")
    assert list(resumed.losses) == [5, 6]
    assert resumed.losses[6] == each_third.losses[6], "the mean of 4, 5 and 6"


@pytest.mark.parametrize(
    "start", [Namespace(iteration=4, log_interval=2), Namespace(iteration=0, log_interval=3)], ids=str
)
def test_interval_of_other_lines_is_left_out(start, monkeypatch):
    """Another --log-interval, or --finetune, which counts from 0."""
    monkeypatch.setattr(step_log, "get_args", lambda: start)
    totals: dict = {}
    step_log._resume(totals, 4, {"log_interval": 3, "seconds": 1.0, "counts": {"advanced iterations": 1}, "losses": {}})
    assert totals == {}


def test_step_without_a_loss_is_told(each_step):
    assert each_step.text.count(f"step {MASKED}: no position with a loss") == 1
    (line,) = [line for line in each_step.text.splitlines() if re.search(rf"iteration +{MASKED}/", line)]
    assert "lm loss" not in line and "number of skipped iterations:   1" in line


def test_rates_of_a_small_model(each_step, folder):
    shown = r"throughput per GPU \(TFLOP/s/GPU\): (\S+) \| tokens/s/GPU: (\S+) \| time left: (\S+) \|"
    rates = re.findall(shown, each_step.text)
    assert len(rates) == 8 and all(
        float(flops) > 0 and float(tokens.replace(",", "")) > 0 for flops, tokens, _ in rates
    )
    events = EventAccumulator(str(folder / "curves"))
    events.Reload()
    for name, column in (("tflops-per-gpu", 0), ("tokens-per-second", 1)):
        written = [event.value for event in events.Scalars(f"throughput/{name}")]
        assert written == pytest.approx([float(rate[column].replace(",", "")) for rate in rates], rel=0.01)


def test_share_of_the_peak():
    rates = Rates(1e5, flops_per_gpu=400e12, peak_per_gpu=989e12, seconds_left=90061, gpus=8)
    assert rates.text() == (
        "throughput per GPU (TFLOP/s/GPU): 400 | tokens/s/GPU: 12,500 | MFU: 40.4% | time left: 1 day, 1:01:01 |"
    )
    assert rates.scalars()["throughput/mfu"] == pytest.approx(400 / 989)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 PCIe", 756), ("NVIDIA H20", 148), ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_peaks(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_peak_that_is_not_known():
    assert peak_flops("NVIDIA GeForce RTX 9999") is None
