"""Rotary position embedding of interleaved pairs (2j, 2j+1), which reads and writes every value once.

Transformer Engine's kernel takes half as long again for a cross-decoder layer's queries (benchmarks/NOTES.md). fp32
arithmetic. Tensor legend: S sequence, B batch, H heads, D head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from yoco_megatron.ops.integers import next_power_of_2


@triton.jit
def rotate_pairs(
    X, OUT, COS, SIN, B, angle_s, angle_b, x_token, x_head, x_part, out_token, out_head, out_part, sign,
    H: tl.constexpr, HP: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rotate the pairs (2j, 2j+1) of X [N, H, parts, D] by sign * angle, the first PARTS parts of each head. One
    program works on all heads of one of N = S * B tokens, HP being H rounded up to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    angle = (token // B) * angle_s + (token % B) * angle_b + tl.arange(0, D // 2)[None, :]
    cos = tl.load(COS + angle)
    sin = tl.load(SIN + angle) * sign
    row = tl.arange(0, PARTS * HP)[:, None]
    head = row // PARTS
    part = row % PARTS
    d = tl.arange(0, D)[None, :]
    inside = head < H
    x = tl.load(X + token * x_token + head * x_head + part * x_part + d, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(x.reshape(PARTS * HP, D // 2, 2))
    x = tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(PARTS * HP, D)
    tl.store(OUT + token * out_token + head * out_head + part * out_part + d, x.to(OUT.dtype.element_ty), mask=inside)


def rotate_into(x: Tensor, out: Tensor, angles: Tensor, parts: int, backwards: bool = False) -> None:
    """Rotate the first `parts` parts of each head of x [S, B, H, >= parts, D] into those of `out`, which may be x.

    angles: fp32 [S, 1 or B, 1, D], equal in pairs. D is a power of two; the last dimension is contiguous.
    """
    S, B, H, _, D = x.shape
    cos, sin = _cos_sin(angles)
    rotate_pairs[(S * B,)](
        x, out, cos, sin, B, cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0,
        _token_stride(x), *x.stride()[2:4], _token_stride(out), *out.stride()[2:4], -1.0 if backwards else 1.0,
        H=H, HP=next_power_of_2(H), PARTS=parts, D=D, num_warps=8 if parts > 1 else 4,
    )  # fmt: skip


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of each pair, [S, 1 or B, D / 2]; cached on the angles, which all layers of a half share."""
    if not hasattr(angles, "_cos_sin"):
        pairs = angles[:, :, 0, ::2].contiguous()
        angles._cos_sin = pairs.cos(), pairs.sin()  # type: ignore[attr-defined]
    return angles._cos_sin  # type: ignore[attr-defined]


def _token_stride(x: Tensor) -> int:
    """Stride from one of the S * B tokens to the next. (A dimension of length one may have any stride.)"""
    S, B = x.shape[:2]
    assert S == 1 or B == 1 or x.stride(0) == B * x.stride(1), "the samples of a position must be neighbours"
    return x.stride(1) if B > 1 else x.stride(0)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _rotated(x, angles, backwards=False)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        return _rotated(dy.contiguous(), angles, backwards=True), None


def _rotated(x: Tensor, angles: Tensor, backwards: bool) -> Tensor:
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    rotate_into(x.unsqueeze(3), out.unsqueeze(3), angles, 1, backwards)
    return out


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [S, B, H, D], a 16-bit or fp32 dtype, heads at any stride, rotated by `angles` (see `rotate_into`)."""
    return _Rotate.apply(x, angles)
