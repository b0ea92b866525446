"""Peaks of the dry run beside what torch's allocator held on H100 and H200 (benchmarks/results.jsonl).

Some rows run always, all others with EVERY_ROW=1, in five minutes. Left out are rows that the dry run does not stand
for, with the reason, and all but one of those that differ in their device, date or number of micro-batches alone.
"""

import json
import os
from pathlib import Path

import pytest
from support.worlds import spawn

from yoco_megatron.costs.memory import GIB
from yoco_megatron.dry_run.confirm import NO_FILES
from yoco_megatron.dry_run.fake_rank import run_rank

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in (ROOT / "tests/fixtures/measured_steps.jsonl").read_text().splitlines()]
ALWAYS = (
    "3b 8 layers GPT with our chunked loss 131072 bf16, micro-batch 1",
    "3b 8 layers gated_retention 131072 bf16, loss on the last 4096, positions with loss",
    "3b 8 layers sliding_window 65536 bf16 CP2 selective recompute",
    "160m gated_retention 1024 bf16, micro-batch 8",
    "3b sliding_window 4096 delayed, micro-batch 2",
)


def value(flags: list[str], name: str, default: int = 1) -> int:
    return int(flags[flags.index(name) + 1]) if name in flags else default


def why_not(row: dict) -> str | None:
    """Why the dry run does not stand for a row."""
    flags = row["flags"].split()
    rows = value(flags, "--micro-batch-size") * value(flags, "--seq-length") // value(flags, "--context-parallel-size")
    is_yoco = "GPT" not in row["case"]
    if not is_yoco and "--context-parallel-size" in flags:
        return "Transformer Engine's attention over several GPUs"
    if value(flags, "--seq-length") == 1 << 20:
        return "cuDNN's workspace (-15%), and K,V that were gathered then and stay now (-3%)"
    if row["commit"] in ("b3d4e72", "7d248aa") and is_yoco and rows > value(flags, "--loss-chunk-size", rows):
        return "since then the loss keeps the logits of its last chunk (up to +1.2%)"
    return "weights in FP8 alone" if "--fp8-param-gather" in flags else None


def cases() -> list:
    seen, found = set(), []
    for row in ROWS:
        flags = row["flags"].split()
        at = flags.index("--global-batch-size") + 1
        model = value(flags, "--tensor-model-parallel-size") * value(flags, "--context-parallel-size")
        stages = value(flags, "--pipeline-model-parallel-size")
        data_parallel = row["gpus"] // (model * stages)
        # As many micro-batches as are in flight at a time, and two where there is no pipeline.
        chunks = value(flags, "--num-virtual-stages-per-pipeline-rank")
        count = 2 if stages == 1 else stages * (chunks + 1)
        sequences = value(flags, "--micro-batch-size") * data_parallel
        flags[at] = str(min(value(flags, "--global-batch-size"), count * sequences))
        key = tuple(flag for flag in flags if flag != "--tp-comm-overlap")
        if why_not(row) or key in seen:
            continue
        seen.add(key)
        found.append(pytest.param(flags, row["gpus"], row["peak memory"], id=row["case"]))
    return found


CASES = cases()


def _peak(flags: list[str], rank: int, world_size: int) -> int:
    import pretrain_yoco

    os.chdir(ROOT)  # flags name configs from there
    length = str(value(flags, "--seq-length"))
    flags = [*flags, *NO_FILES, "--max-position-embeddings", length]
    return run_rank(pretrain_yoco.main, flags, rank, world_size).peak_bytes


@pytest.mark.parametrize(
    ("flags", "gpus", "measured"), [case for case in CASES if case.id in ALWAYS or "EVERY_ROW" in os.environ]
)
def test_peak(flags, gpus, measured):
    """Of the fullest pipeline rank, as torch's allocator of a run has it: within 1%."""
    stage = gpus // value(flags, "--pipeline-model-parallel-size")
    peaks = [spawn(_peak, 1, (flags, rank, gpus))[0] / GIB for rank in range(0, gpus, stage)]
    print(f"{max(peaks):.2f} GiB, measured {measured}: {max(peaks) / measured - 1:+.2%}")
    assert max(peaks) == pytest.approx(measured, rel=0.01)


def test_rows_are_most_of_those_measured():
    assert {case.id for case in CASES} > set(ALWAYS)
    assert len(CASES) > 80
