"""SwiGLU, y = silu(a) b of [..., a and b side by side]: one kernel each way, which reads and writes every value once.

Megatron's fused backward concatenates the two halves of the gradient. torch.compile turns that into one kernel over
both halves, which loads a, b and dy for each of them: too many loads for an H100's memory (benchmarks/NOTES.md), but
not for the faster memory of an H200. Megatron's forward has no such flaw, but each call passes torch.compile's guards,
which costs the host more than a launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from yoco_megatron.ops.integers import cdiv

BLOCK = 1024


@triton.jit
def _forward(WIDE, Y, F, BLOCK: tl.constexpr):
    """Y [N, F] of WIDE [N, 2 F], both contiguous; fp32 arithmetic, one block of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    a = tl.load(WIDE + row * 2 * F + column, mask=inside).to(tl.float32)
    b = tl.load(WIDE + row * 2 * F + F + column, mask=inside).to(tl.float32)
    tl.store(Y + row * F + column, (a * tl.sigmoid(a) * b).to(Y.dtype.element_ty), mask=inside)


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


def _grid(narrow: Tensor) -> tuple[int, int]:
    width = narrow.shape[-1]
    return narrow.numel() // width, cdiv(width, BLOCK)


def swiglu_into(wide: Tensor, out: Tensor) -> None:
    """Write swiglu(wide) into `out` [..., F], contiguous; without a gradient."""
    _forward[_grid(out)](wide.contiguous(), out, out.shape[-1], BLOCK=BLOCK, num_warps=4)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wide: Tensor) -> Tensor:
        ctx.save_for_backward(wide)
        y = wide.new_empty(*wide.shape[:-1], wide.shape[-1] // 2)
        swiglu_into(wide, y)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (wide,) = ctx.saved_tensors
        dy, wide = dy.contiguous(), wide.contiguous()
        dwide = torch.empty_like(wide)
        _backward[_grid(dy)](dy, wide, dwide, dy.shape[-1], BLOCK=BLOCK, num_warps=4)
        return dwide


def swiglu(wide: Tensor) -> Tensor:
    """wide [..., 2 F], a 16-bit dtype or fp32 -> [..., F] in the same dtype, rounded once."""
    return _SwiGLU.apply(wide)
