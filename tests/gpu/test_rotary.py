"""The rotary embedding on a GPU against float64; bf16 rounds once: half a last place is 2^-9, 2e-3."""

import pytest
import torch
from support.rotary import CASES, check_rotation

from yoco_megatron.ops.fused.rotary import rotate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("shape", "of_samples"), [*CASES, ((4096, 2, 24, 128), False)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_equals_float64(shape: tuple, of_samples: bool, dtype: torch.dtype, tolerance: float) -> None:
    check_rotation(rotate, shape, of_samples, dtype, tolerance)


def test_more_values_than_32_bits_count() -> None:
    """Rows of a wide projection, so that the last one lies beyond 2^31 values."""
    wide = torch.empty(2**17 + 8, 1, 2**14, device="cuda", dtype=torch.bfloat16)
    heads = wide[..., :256].unflatten(-1, (2, 128))
    heads.normal_()
    angles = torch.randn(len(wide), 1, 1, 64, device="cuda").repeat_interleave(2, -1)
    last = slice(len(wide) - 4, None)
    assert torch.equal(rotate(heads, angles)[last], rotate(heads[last].contiguous(), angles[last]))
