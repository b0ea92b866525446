"""Tensor parallelism on two GPUs with Transformer Engine's overlap of communication and products, --tp-comm-overlap.

Against the same run without it; bf16 sums in another order, so runs and tolerances are those of test_meshes.py.
"""

import pytest
import torch
from gpu.test_meshes import WHOLE, assert_close, flags_of
from support.cli import Log, parse, run_script
from support.models import SELF_DECODERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("all GPUs"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def run(kind: str, more: str = "") -> tuple[Log, str]:
    """(figures, what the first rank prints)"""
    # CUDA IPC, which every host with NVLink has, instead of multicast
    ranks = run_script(2, *flags_of("TP2", kind, more), env={"UB_SKIPMC": "1"})
    assert [code for code, _ in ranks] == [0, 0], ranks[0][1][-6000:]
    return parse(ranks[-1][1]), ranks[0][1]


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_overlapped_products_train_alike(kind: str) -> None:
    plain, without = run(kind)
    overlapped, printed = run(kind, "--tp-comm-overlap")
    assert "[UB]" in printed and "[UB]" not in without, "Transformer Engine says so of its communicators"
    assert plain.loss(WHOLE) < 0.95 * plain.loss(1)
    assert_close(overlapped, plain, 1)
