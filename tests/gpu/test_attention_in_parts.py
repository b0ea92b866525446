"""cuDNN's attention of queries over the keys of each context-parallel rank, merged, against float64.

Parts, merged outputs and gradients are rounded to bf16, each by up to 2^-9 of its size: 1% of a tensor's norm.
"""

import pytest
import torch
from support.attention_parts import travelling_and_causal
from support.models import relative_error

from yoco_megatron.parallel.context.query_shard import Runs

pytestmark = pytest.mark.gpu
LENGTH = 4096  # chunks of 1024 for two ranks, of 512 for four
RUNS = {
    "a suffix in one chunk": ((3840, 4096),),
    "a suffix across borders": ((2432, 4096),),
    "runs in a chunk, across borders, and a chunk": ((128, 256), (384, 1152), (1280, 1408), (3072, 3584)),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_bf16(runs: Runs, ranks: int) -> None:
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    for name, (found, wanted) in travelling_and_causal(runs, ranks, LENGTH, like, 8, 2, 128).items():
        error = relative_error(found, wanted)
        assert error < 1e-2, f"{name}: {error:.1e}"
