"""The lines of a run: which steps' losses they hold, also after a start in the middle of an interval; rates."""

import re
import statistics
import time
from argparse import Namespace
from collections.abc import Callable

import pytest
from support.cli import Log, _main, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from yoco_megatron.costs.gpu_peak import peak_flops
from yoco_megatron.upstream import log_lines, step_log
from yoco_megatron.upstream.throughput import Rates

FLAGS = ("--train-iters", "8", "--num-workers", "0", "--eval-iters", "0")
MASKED = 7
SHOWN = 1e-6  # of a mean of printed losses


def _write_slowly(writer: RecordWriter, data: bytes, write: Callable = RecordWriter.write) -> None:
    """As on a busy machine: when a run ends, the thread of the curves is behind."""
    if b"validation" in data:
        time.sleep(0.2)
    write(writer, data)


def _without_loss_in_one_step(flags: list[str]) -> None:
    from megatron.training import get_args

    from yoco_megatron.training import step

    original = step.loss_func
    RecordWriter.write = _write_slowly
    step.loss_func = lambda mask, losses: original(mask * (get_args().curr_iteration + 1 != MASKED), losses)
    _main(flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def each_step(folder) -> Log:
    """A line for each step."""
    curves = ("--tensorboard-dir", str(folder / "curves"), "--eval-iters", "1")  # at the end
    return train(1, *FLAGS, *curves, entry=_without_loss_in_one_step)


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
    (line,) = [line for line in each_step.text.splitlines() if re.search(rf" {MASKED}/8  ", line)]
    assert "lm loss" not in line and "  skipped 1  " in line


def test_rates_of_a_small_model(each_step, folder):
    shown = r"  (\S+) tok/s/CPU  (\S+ [MG])FLOP/s  (\S+) GiB  \S+ left$"
    units = {",": "", " M": "E6", " G": "E9"}
    lines = re.findall(shown, each_step.text, re.M)
    rates = [[float(re.sub("|".join(units), lambda unit: units[unit[0]], value)) for value in line] for line in lines]
    assert len(rates) == 8 and all(value > 0 for line in rates for value in line)
    events = EventAccumulator(str(folder / "curves"))
    events.Reload()
    names = {"tokens-per-second-per-gpu": 1, "tflops-per-gpu": 1e12}
    scales = {f"throughput/{name}": scale for name, scale in names.items()} | {"memory/peak-gib": 1}
    for column, (name, scale) in enumerate(scales.items()):
        written = [event.value * scale for event in events.Scalars(name)]
        assert written == pytest.approx([rate[column] for rate in rates], rel=0.01, abs=0.06), name
    assert len(events.Scalars("lm loss validation vs samples")) == 2, "behind the last step, of both held-out parts"


def test_a_run_starts_with_few_lines_each_of_which_fits_a_terminal(each_step):
    before, _, _ = each_step.text.partition(" 1/8  lm loss ")
    assert 5 < len(before.splitlines()) <= 20, before
    lines = [line for line in each_step.text.splitlines() if re.search(r" \d/8  | loss at iteration ", line)]
    assert len(lines) >= 8 and max(map(len, lines)) <= 120


RATES = Rates(
    seconds_per_step=1.25, tokens_per_second=1e5, flops_per_gpu=400e12, peak_per_gpu=989e12, seconds_left=90061, gpus=8,
    memory=31 * 2**30,
)  # fmt: skip


def test_share_of_the_peak():
    assert RATES.texts() == ["12,500 tok/s/CPU", "MFU 40.4%", "31.0 GiB", "1d01h left"]
    assert RATES.in_megatrons_style() == (
        "throughput per GPU (TFLOP/s/GPU): 400 | tokens/s/GPU: 12,500 | MFU: 40.4% | time left: 1 day, 1:01:01 |"
    )
    assert RATES.scalars()["throughput/mfu"] == pytest.approx(400 / 989)


MEGATRONS = (
    " [2026-11-28 03:54:03.360306] iteration        1/       4 | consumed samples:            8 | elapsed time per"
    " iteration (ms): 85.3 | throughput per GPU (TFLOP/s/GPU): 0.0 | learning rate: 3.333333E-03 | global batch size:"
    "     8 | lm loss: 6.647708E+00 | loss scale: {} | grad norm: 1.088 | num zeros: 3 | number of skipped iterations:"
    " {:3d} | number of nan iterations:   0 |"
)


def test_the_line_of_a_step():
    usual = "11-28 03:54  1/4  lm loss 6.647708  norm 1.088  lr 3.33e-03"
    assert log_lines.step_line(MEGATRONS.format(1.0, 0), ["2 GiB"], False) == f"{usual}  num zeros 3  2 GiB"
    unusual = log_lines.step_line(MEGATRONS.format(2.0, 1), ["2 GiB"], True)
    assert unusual == f"{usual}  global batch size 8  loss scale 2.0  num zeros 3  skipped 1  2 GiB"


def test_the_line_of_a_long_run_fits_a_terminal():
    late = MEGATRONS.format(1.0, 0).replace("        1/       4", "  123456/  400000").replace("num zeros: 3 |", "")
    line = log_lines.step_line(late, RATES.texts(), False)
    assert line.startswith("11-28 03:54  123456/400000  lm loss 6.647708  norm 1.088  lr 3.33e-03  12,500 tok/s/")
    assert len(line) <= 120
    more = late.replace("| grad norm", "| mtp_1 loss: 1.020000E+00 | grad norm")
    assert "  mtp_1 loss 1.0200  " in log_lines.step_line(more, RATES.texts(), False)


def test_the_line_of_an_evaluation(monkeypatch):
    monkeypatch.setitem(log_lines.bytes_per_token, "-wiki", 4.0)
    told = " validation{} loss at iteration 20 on test set | lm loss value: 2.772589E+00 | lm loss PPL: 1.600000E+01 | "
    scalars = log_lines.evaluation_scalars(told.format("-wiki"))
    assert scalars == pytest.approx({"perplexity": 16, "bits-per-byte": 1})
    line = log_lines.evaluation_line(told.format("-wiki"), scalars)
    loss = "validation-wiki loss at iteration 20 on test set  lm loss 2.772589"
    assert line.partition("  ")[2] == f"{loss}  perplexity 16.00  bits per byte 1.000"
    assert log_lines.evaluation_scalars(told.format("")) == pytest.approx({"perplexity": 16})


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 PCIe", 756), ("NVIDIA H20", 148), ("NVIDIA GH200 480GB", 989), ("NVIDIA A100-SXM4-80GB", 312)],
)
def test_peaks(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_peak_that_is_not_known():
    assert peak_flops("NVIDIA GeForce RTX 9999") is None
