"""SwiGLU, y = silu(a) b of [..., a and b side by side], with a backward that reads and writes every value once.

Megatron's fused backward joins both halves of the gradient with `cat`. The compiler makes of that one kernel over the
joined tensor, which loads a, b and dy for each half. An H100's memory keeps up with no more (docs/performance.md); the
faster one of an H200 does.
"""

import torch
import triton
import triton.language as tl
from megatron.core.fusions.fused_bias_swiglu import swiglu as forward
from torch import Tensor

BLOCK = 1024


@triton.jit
def _backward(DY, WIDE, DWIDE, F, BLOCK: tl.constexpr):
    """DWIDE [N, 2 F] of DY [N, F] and WIDE [N, 2 F], all contiguous; fp32 arithmetic, one block of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    dy = tl.load(DY + row * F + column, mask=inside).to(tl.float32)
    a = tl.load(WIDE + row * 2 * F + column, mask=inside).to(tl.float32)
    b = tl.load(WIDE + row * 2 * F + F + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    da = dy * sigmoid * (1.0 + a * (1.0 - sigmoid)) * b
    db = dy * a * sigmoid
    tl.store(DWIDE + row * 2 * F + column, da.to(DWIDE.dtype.element_ty), mask=inside)
    tl.store(DWIDE + row * 2 * F + F + column, db.to(DWIDE.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wide: Tensor) -> Tensor:
        ctx.save_for_backward(wide)
        return forward(wide)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (wide,) = ctx.saved_tensors
        dy, wide = dy.contiguous(), wide.contiguous()
        width = dy.shape[-1]
        dwide = torch.empty_like(wide)
        _backward[(dy.numel() // width, triton.cdiv(width, BLOCK))](dy, wide, dwide, width, BLOCK=BLOCK, num_warps=4)
        return dwide


def swiglu(wide: Tensor) -> Tensor:
    """wide [..., 2 F], 16 or 32 bits a value -> [..., F]; forward is Megatron's own fused kernel, bit for bit."""
    return _SwiGLU.apply(wide.reshape(-1, wide.shape[-1])).view(*wide.shape[:-1], -1)
