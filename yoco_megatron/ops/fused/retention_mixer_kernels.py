"""Triton kernels of the headwise norm times the gate.

One program works on all heads of one token, which are neighbours in memory. All arithmetic is fp32; every tensor is
read and written once. Legend: N tokens (S * B), H heads, HP heads rounded up to a power of two, D head width.
"""

import triton
import triton.language as tl


@triton.jit
def norm_gate(
    X, GATE, Y, gate_token, gate_head, eps, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Y = silu(gate) * RMS(o). o (X) and Y [N, H, D] contiguous, GATE [N, H, D] strided."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HP)[:, None]
    d = tl.arange(0, D)[None, :]
    inside = head < H
    at = token * H * D + head * D + d
    o = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(GATE + token * gate_token + head * gate_head + d, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(o * o, 1) / D + eps)
    tl.store(Y + at, (g * tl.sigmoid(g) * o * scale[:, None]).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def norm_gate_backward(
    X, GATE, DY, DO, DGATE, gate_token, gate_head, eps, H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """DO (like o, X) and DGATE (strided like GATE) from DY. With n = o r, r = 1 / rms: dn = dy silu(g),
    do = r (dn - n mean(dn n)), dg = dy n silu'(g)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HP)[:, None]
    d = tl.arange(0, D)[None, :]
    inside = head < H
    at = token * H * D + head * D + d
    gate_at = token * gate_token + head * gate_head + d
    o = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(GATE + gate_at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(o * o, 1) / D + eps)[:, None]
    n = o * scale
    sigmoid = tl.sigmoid(g)
    dn = dy * g * sigmoid
    do = scale * (dn - n * (tl.sum(dn * n, 1) / D)[:, None])
    dg = dy * n * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(DO + at, do.to(DO.dtype.element_ty), mask=inside)
    tl.store(DGATE + gate_at, dg.to(DGATE.dtype.element_ty), mask=inside)
