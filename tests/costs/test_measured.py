"""Memory and seconds of a step, beside those that were measured on H100 and H200 (benchmarks/results.jsonl).

The formulas of memory are derived from shapes; which tensors live at a peak was decided with these rows in sight. The
figures of the cards (yoco_megatron/costs/cards) come from breakdowns and from the rows marked `calibration`, which the
test of the time leaves out.
"""

import json
from pathlib import Path
from statistics import median

import pytest

from yoco_megatron.costs.card import Card
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
        args.max_position_embeddings = None  # the configs': these lengths were set when none was told beside them
        plan = Plan.of(args, Card.of("h200" if "H200" in row["device"] else "h100"))
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
    assert len(ROWS) == 120
    assert median(abs(error) for error, _ in errors["memory"]) < 0.008
    assert within(errors["memory"], 0.03) == len(ROWS)


# Further off than 8%, and why. In all but the last two the host decides, in another way than the model knows.
BEFORE = "before the host was spared (b538d1d): no kernel ran in 42% to 47% of such a step"
NEAR = "the host needs nearly as long as the GPU, and the ranks' hosts wait for each other"
OUTLIERS = {
    "3b sliding_window 512 bf16, micro-batch 1": "a third slower from the seventh step on, for no known reason",
    "3b GPT 4096 bf16 PP2xTP2 --tp-comm-overlap, micro-batch 2": BEFORE,
    "3b gated_retention 4096 bf16 PP2xTP2 --tp-comm-overlap, micro-batch 2": BEFORE,
    "3b gated_retention 4096 delayed-gather, micro-batch 4": "FP8 weights are cast one by one, from the host",
    "3b-4096 on 4: CP2 DP2 micro-batch 4, none": NEAR,
    "13b-4096 on 4: TP2 PP2 VP4 micro-batch 1, none": NEAR,
    "3b gated_retention 131072 bf16 CP4, loss on the last 4096, positions with loss": (
        "each rank has 1,024 queries for 131,072 keys: short kernels, as the host sees them"
    ),
    "3b gated_retention 4096 bf16 TP2xDP2, micro-batch 4": "before the loss stored its last chunk's logits",
    "3b-32768 on 4: PP2 VP6 CP2 micro-batch 1, none": "twelve stages of 26 layers, whose passes wait for each other",
}


def test_time(errors):
    """Rows that no figure of a card was taken from."""
    rows = [(*pair, row["device"]) for pair, row in zip(errors["time"], ROWS) if not row.get("calibration")]
    held_out = [(error, case) for error, case, _ in rows]
    assert len(held_out) == 100
    assert median(abs(error) for error, _ in held_out) < 0.03
    assert {case for error, case in held_out if abs(error) > 0.08} == OUTLIERS.keys()
    assert all(abs(error) < 0.30 for error, _ in held_out)
    of_h200 = [abs(error) for error, _, device in rows if "H200" in device]
    assert len(of_h200) == 18 and median(of_h200) < 0.04
