"""Fused SwiGLU: Megatron's, on a GPU with a backward of our own (triton.py)."""

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from torch import Tensor


def fused_swiglu(wide: Tensor) -> Tensor:
    """silu(a) b of wide [s, b, 2 F], a and b side by side -> [s, b, F], rounded once."""
    if not wide.is_cuda or wide.dtype == torch.float64:
        return bias_swiglu_impl(wide, None)
    from yoco_megatron.ops.swiglu.triton import swiglu

    return swiglu(wide)
