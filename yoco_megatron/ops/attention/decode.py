"""One query per sequence over a K,V cache in blocks: split-KV attention, with the length on the device.

The cache is a table of the addresses of its blocks, so that it grows without being copied, and a step that was captured
as a CUDA graph still reads it: new blocks enter the table, and the kernel reads the length when it runs. Addresses are
offsets in elements from a base, because the compiler knows the alignment of a pointer argument, not of a number.

Shapes: B sequences, H query heads, G K,V heads, D head width. K and V of a block are read at
offset + b * batch_stride + g * head_stride + t * W + d, for tokens t of the block. W is D; or D + 4, if the cache holds
bytes (quantized.py): then the scores are multiplied with the keys' scales, the probabilities with the values'.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from yoco_megatron.ops.attention.quantized import SCALE_BYTES
from yoco_megatron.ops.integers import next_power_of_2

TILE = 64
"""Tokens that a program reads at a time; a block's capacity is a multiple of it."""


@dataclass(frozen=True)
class BlockTable:
    """Where K and V are: int64 offsets [blocks] each (`offset_of`), tokens per block, element strides in a block."""

    base: Tensor
    keys: Tensor
    values: Tensor
    capacity: int
    batch_stride: int
    head_stride: int
    kind: str | None = None
    """One of `quantized.FORMATS`, if the blocks hold bytes."""


def offset_of(block: Tensor, base: Tensor) -> int:
    """Offset of a block in elements from `base`; both are aligned to 16 bytes or more."""
    distance = block.data_ptr() - base.data_ptr()
    assert distance % (8 * block.element_size()) == 0
    return distance // block.element_size()


@triton.jit
def _unscaled(x, KIND: tl.constexpr):
    """The values, fp32, that bytes hold."""
    return (x.to(tl.int8, bitcast=True) if KIND == "int8" else x.to(tl.float8e4nv, bitcast=True)).to(tl.float32)


@triton.jit
def _scale(row, D: tl.constexpr, valid):
    """Of each token's head, behind its values."""
    return tl.load((row + D).to(tl.pointer_type(tl.float32)), mask=valid, other=0.0)


@triton.jit
def _partial(
    q, base, keys, values, length, out, stats, scale, batch_stride, head_stride,
    CAPACITY: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, KIND: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """One split of the tokens, for the queries of one K,V head: (unnormalised output, maximum, sum)."""
    b, g, split = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1)
    rows, d, t = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, TILE)
    row = (b * GROUPS + g) * PER_GROUP + rows
    own = rows < PER_GROUP
    q_RD = tl.load(q + row[:, None] * D + d[None, :], mask=own[:, None], other=0.0)
    n = tl.load(length).to(tl.int32)
    share = tl.cdiv(tl.cdiv(n, SPLITS), TILE) * TILE
    start, end = split * share, tl.minimum(n, (split + 1) * share)
    inside = b.to(tl.int64) * batch_stride + g.to(tl.int64) * head_stride
    m_R = tl.full((ROWS,), float("-inf"), tl.float32)
    l_R = tl.zeros((ROWS,), tl.float32)
    o_RD = tl.zeros((ROWS, D), tl.float32)
    for at in range(start, end, TILE):
        block, first = at // CAPACITY, at % CAPACITY
        k_base = base + tl.multiple_of(tl.load(keys + block), [8]) + inside
        v_base = base + tl.multiple_of(tl.load(values + block), [8]) + inside
        valid = at + t < end
        row_T = (first + t).to(tl.int64) * W
        token = row_T[:, None] + d[None, :]
        k_TD = tl.load(k_base + token, mask=valid[:, None], other=0)
        v_TD = tl.load(v_base + token, mask=valid[:, None], other=0)
        if KIND is not None:
            k_TD, v_TD = _unscaled(k_TD, KIND).to(q_RD.dtype), _unscaled(v_TD, KIND).to(q_RD.dtype)
        s_RT = tl.dot(q_RD, tl.trans(k_TD), input_precision="ieee") * scale
        if KIND is not None:
            s_RT *= _scale(k_base + row_T, D, valid)[None, :]
        s_RT = tl.where(valid[None, :], s_RT, float("-inf"))
        new_R = tl.maximum(m_R, tl.max(s_RT, axis=1))
        rescale_R = tl.exp2(m_R - new_R)
        p_RT = tl.exp2(s_RT - new_R[:, None])
        l_R = l_R * rescale_R + tl.sum(p_RT, axis=1)
        if KIND is not None:
            p_RT *= _scale(v_base + row_T, D, valid)[None, :]
        o_RD = o_RD * rescale_R[:, None] + tl.dot(p_RT.to(v_TD.dtype), v_TD, input_precision="ieee")
        m_R = new_R
    at = row * SPLITS + split
    tl.store(out + at[:, None] * D + d[None, :], o_RD, mask=own[:, None])
    tl.store(stats + 2 * at, m_R, mask=own)
    tl.store(stats + 2 * at + 1, l_R, mask=own)


@triton.jit
def _combine(out, stats, result, D: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the splits of one query head."""
    row = tl.program_id(0)
    s, d = tl.arange(0, SPLITS), tl.arange(0, D)
    at = row * SPLITS + s
    m_S, l_S = tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1)
    w_S = tl.where(l_S > 0, tl.exp2(m_S - tl.max(m_S, axis=0)), 0.0)
    o_SD = tl.load(out + at[:, None] * D + d[None, :])
    o_D = tl.sum(o_SD * w_S[:, None], axis=0) / tl.sum(l_S * w_S, axis=0)
    tl.store(result + row * D + d, o_D.to(result.dtype.element_ty))


@triton.jit
def _append(
    k, v, base, keys, values, position, batch_stride, head_stride,
    CAPACITY: tl.constexpr, GROUPS: tl.constexpr, W: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write one token's K and V of one head at `position`."""
    b, g = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS
    w = tl.arange(0, LANES)
    p = tl.load(position)
    inside = b.to(tl.int64) * batch_stride + g.to(tl.int64) * head_stride + (p % CAPACITY) * W + w
    source = tl.program_id(0) * W + w
    tl.store(base + tl.load(keys + p // CAPACITY) + inside, tl.load(k + source, mask=w < W), mask=w < W)
    tl.store(base + tl.load(values + p // CAPACITY) + inside, tl.load(v + source, mask=w < W), mask=w < W)


def splits_for(batch: int, groups: int, device: torch.device) -> int:
    """A power of two of splits that fills the GPU about twice."""
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return min(128, next_power_of_2(max(1, programs // (batch * groups))))


def decode_attention(q: Tensor, table: BlockTable, length: Tensor, groups: int, scale: float, splits: int) -> Tensor:
    """softmax(scale q K^T) V over the first `length` tokens of the cache.

    Args:
        q: [B, H, D] in the cache's dtype, or in any that holds its bytes; D a power of two of at least 16.
        length: integer [1] on the device; at least 1.
        groups: K,V heads; query head h reads head h * groups // H.
        splits: parts of the sequence that run side by side, a power of two (`splits_for`).
    Returns:
        [B, H, D] in q's dtype; the arithmetic is fp32.
    """
    B, H, D = q.shape
    q = q.contiguous()
    out = q.new_empty(B * H, splits, D, dtype=torch.float32)
    stats = q.new_empty(B * H, splits, 2, dtype=torch.float32)
    result = torch.empty_like(q)
    _partial[(B * groups, splits)](
        q, table.base, table.keys, table.values, length, out, stats, scale * 1.4426950408889634, table.batch_stride,
        table.head_stride, CAPACITY=table.capacity, GROUPS=groups, PER_GROUP=H // groups,
        ROWS=max(16, next_power_of_2(H // groups)), D=D, TILE=TILE, SPLITS=splits, KIND=table.kind,
        W=D + SCALE_BYTES if table.kind else D, num_warps=4,
    )  # fmt: skip
    _combine[(B * H,)](out, stats, result, D=D, SPLITS=splits)
    return result


def append(k: Tensor, v: Tensor, table: BlockTable, position: Tensor) -> None:
    """Write k, v [B, G, D] as the cache's token number `position` (integer [1] on the device); bytes are packed."""
    B, G, W = k.shape
    _append[(B * G,)](
        k.contiguous(), v.contiguous(), table.base, table.keys, table.values, position, table.batch_stride,
        table.head_stride, CAPACITY=table.capacity, GROUPS=G, W=W, LANES=next_power_of_2(W),
    )  # fmt: skip
