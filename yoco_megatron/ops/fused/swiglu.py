"""Fused SwiGLU, silu(a) b rounded once: swiglu_triton.py on a GPU, Megatron's compiled function elsewhere."""

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, swiglu
from torch import Tensor


def fused_swiglu(wide: Tensor) -> Tensor:
    """silu(a) b of wide [s, b, 2 F], a and b side by side -> [s, b, F], rounded once."""
    if not _for_triton(wide):
        return bias_swiglu_impl(wide, None)
    from yoco_megatron.ops.fused import swiglu_triton

    return swiglu_triton.swiglu(wide)


def fused_swiglu_into(wide: Tensor, out: Tensor) -> None:
    """Write fused_swiglu(wide), bit for bit, into `out` [s, b, F], contiguous; without a gradient."""
    if not _for_triton(wide):
        out.copy_(swiglu(wide))
        return
    from yoco_megatron.ops.fused import swiglu_triton

    swiglu_triton.swiglu_into(wide, out)


def _for_triton(wide: Tensor) -> bool:
    return wide.is_cuda and wide.dtype != torch.float64
