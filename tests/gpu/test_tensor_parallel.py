"""Tensor parallelism on two GPUs with Transformer Engine's overlap of communication and products, --tp-comm-overlap.

Against the same run without it; bf16 sums in another order, so the tolerances are those of test_meshes.py.
"""

from pathlib import Path

import pytest
import torch
from support.cli import Log, parse, run_script
from support.models import SELF_DECODERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("all GPUs"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
STEPS, SAME_WEIGHTS, TRAINED = 8, 5e-4, 2e-3
CONFIG = Path(__file__).resolve().parents[2] / "configs/model/yoco_tiny.yaml"
FLAGS = (
    f"--config {CONFIG} --hidden-size 256 --num-query-groups 4 --self-decoder-heads 4 --self-decoder-window 300 "
    "--seq-length 2048 --max-position-embeddings 2048 --mock-data --tokenizer-type NullTokenizer --vocab-size 1000 "
    f"--bf16 --micro-batch-size 1 --global-batch-size 4 --train-iters {STEPS} --lr 1e-3 --log-interval 1 "
    "--eval-iters 0 --use-distributed-optimizer --tensor-model-parallel-size 2 --sequence-parallel"
)


def run(kind: str, *more: str) -> tuple[Log, str]:
    """(figures, what the first rank prints)"""
    # CUDA IPC, which every host with NVLink has, instead of multicast
    ranks = run_script(2, *FLAGS.split(), "--self-decoder", kind, *more, env={"UB_SKIPMC": "1"})
    assert [code for code, _ in ranks] == [0, 0], ranks[0][1][-6000:]
    return parse(ranks[-1][1]), ranks[0][1]


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_overlapped_products_train_alike(kind: str) -> None:
    plain, without = run(kind)
    overlapped, printed = run(kind, "--tp-comm-overlap")
    assert "[UB]" in printed and "[UB]" not in without, "Transformer Engine says so of its communicators"
    errors = {step: abs(overlapped.loss(step) / plain.loss(step) - 1) for step in plain.losses}
    print({step: f"{error:.1e}" for step, error in errors.items()})
    assert plain.loss(STEPS) < 0.95 * plain.loss(1)
    assert errors[1] < SAME_WEIGHTS and max(errors.values()) < TRAINED
