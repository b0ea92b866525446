"""`tools/plan.py confirm` says what torch's allocator holds in the same run on this GPU."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.test_training import log_of

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--config configs/model/yoco_1.4b.yaml configs/recipe/scaling.yaml --num-layers 4 --vocab-size 100350 "
    "--seq-length 2048 --micro-batch-size 4 --global-batch-size 4 --use-precision-aware-optimizer "
    "--use-distributed-optimizer"
)
TRAIN = "--mock-data --tokenizer-type NullTokenizer --eval-iters 0 --exit-interval 3 --log-interval 1"


@pytest.mark.parametrize(
    "more",
    ["", "--fp8-format hybrid --fp8-recipe delayed", "--dataloader-inter-document-masking"],
    ids=["bf16", "fp8", "documents"],
)
def test_the_peak_of_a_rank_that_does_not_exist(more: str) -> None:
    """Within 1%, of about 15 GiB."""
    log = log_of(f"{FLAGS} {TRAIN} {more}")
    measured = max(float(value) for value in re.findall(r"max allocated: ([0-9.]+)", log)) / 1024
    command = [sys.executable, "tools/plan.py", "confirm", *FLAGS.split(), *more.split(), "--gpus", "1"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr[-6000:]
    row = next(line for line in said.stdout.splitlines() if "TP0" in line)
    *_, peak, _ = (float(value) for value in re.findall(r"([0-9.]+) GiB", row))
    print(f"confirm: {peak:.3f} GiB, measured {measured:.3f}: {peak / measured - 1:+.2%}")
    assert peak == pytest.approx(measured, rel=0.01)
