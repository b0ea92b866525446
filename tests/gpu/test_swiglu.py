"""SwiGLU and its gradient on a GPU against float64; bf16 rounds each once: half a last place is 2^-9, 2e-3."""

import pytest
import torch
from support.swiglu import SHAPES, check_gradient

from yoco_megatron.ops.fused.swiglu import fused_swiglu, fused_swiglu_into

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("shape", [*SHAPES, (4096, 2, 8192)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_equals_float64(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    check_gradient(fused_swiglu, shape, dtype, tolerance)


def test_made_again_it_has_the_same_bits() -> None:
    wide = torch.randn(64, 2, 2 * 1100, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(64, 2, 1100, device="cuda", dtype=torch.bfloat16)
    fused_swiglu_into(wide, y)
    assert torch.equal(fused_swiglu(wide), y)
