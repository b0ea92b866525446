"""Memory and seconds of a step, beside those that were measured on H100 and H200 (benchmarks/results.jsonl).

The formulas of memory are derived from shapes; which tensors live at a peak was decided with these rows in sight. The
rates of the card come from breakdowns of one and two GPUs. Largest errors of the time: small models and lengths, which
the host bounds; FP8 at micro-batch 1; rows from before the host's work was cut.
"""

import json
from pathlib import Path
from statistics import median

import pytest

from yoco_megatron.costs.card import CARDS
from yoco_megatron.costs.memory import GIB
from yoco_megatron.planning.flags import parse
from yoco_megatron.planning.mesh import Plan

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in (ROOT / "tests/fixtures/measured_steps.jsonl").read_text().splitlines()]
METRICS = ("peak memory", "throughput", "time a step")


@pytest.fixture(scope="module")
def errors(request) -> dict[str, list[tuple[float, str]]]:
    """{memory, time: [(relative error, case)]}."""
    found: dict[str, list[tuple[float, str]]] = {"memory": [], "time": []}
    for row in ROWS:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)  # flags name configs from there
            args, _ = parse(row["flags"].split(), row["gpus"])
        plan = Plan.of(args, CARDS["h200" if "H200" in row["device"] else "h100"])
        if "throughput" in row:
            seconds = args.global_batch_size * args.seq_length / row["gpus"] / row["throughput"]
        else:
            seconds = row["time a step"] / 1e3
        found["memory"].append((plan.memory.total / GIB / row["peak memory"] - 1, row["case"]))
        found["time"].append((plan.time.seconds / seconds - 1, row["case"]))
    return found


def within(errors: list[tuple[float, str]], limit: float) -> int:
    return sum(abs(error) <= limit for error, _ in errors)


def test_rows_are_recorded_ones():
    recorded = set()
    for line in (ROOT / "benchmarks/results.jsonl").read_text().splitlines():
        row = json.loads(line)
        recorded.add((row["case"], row["device"], row["commit"], row["metric"], row["value"]))
    for row in ROWS:
        for metric in METRICS:
            if metric in row:
                assert (row["case"], row["device"], row["commit"], metric, row[metric]) in recorded


def test_memory(errors):
    """docs/planning.md has these figures."""
    assert len(ROWS) == 107
    assert median(abs(error) for error, _ in errors["memory"]) < 0.010
    assert within(errors["memory"], 0.03) >= 94
    assert within(errors["memory"], 0.10) == len(ROWS)


def test_memory_of_a_loss_at_some_positions(errors):
    """Apart from the row with --mlp-chunks-for-training, whose recompute is not counted in parts."""
    of_suffix = [pair for pair in errors["memory"] if "positions with loss" in pair[1] and "1048576" not in pair[1]]
    assert len(of_suffix) == 5
    assert within(of_suffix, 0.025) == 5


def test_time(errors):
    assert median(abs(error) for error, _ in errors["time"]) < 0.04
    assert within(errors["time"], 0.10) >= 85
    assert all(abs(error) < 0.30 for error, _ in errors["time"])
