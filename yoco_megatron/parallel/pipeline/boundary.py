"""The boundary tensor of two pipeline stages: hidden states, and once they are made the shared K,V, in one tensor.

    [s, b, h]              before the shared K,V are made
    [s, b, h + 2 G D]      after; G K,V heads of this tensor-parallel rank, D head width

With sequence parallelism hidden states are [s/tp, b, h], while each rank holds its K,V heads for all s tokens: their
rows are laid out as [s/tp, b, tp 2 G D], the same bytes. `fp32` sends K,V as fp32 bits in twice the 16-bit columns, so
that their gradients, which have the tensor's shape, travel back unrounded.
"""

import torch
from torch import Tensor


def kv_columns(groups: int, head_dim: int, rows: int, length: int, fp32: bool) -> int:
    """Columns of the K,V in a boundary tensor of `rows` rows: `groups` K,V heads on this rank, `length` tokens."""
    return 2 * groups * head_dim * (length // rows) * (2 if fp32 else 1)


def join_boundary_tensor(hidden_states: Tensor, kv: Tensor, fp32: bool = False) -> Tensor:
    """hidden [rows, b, h] and K,V [s, b, G, 2, D] (fp32 if `fp32`) -> a fresh tensor [rows, b, h + columns].

    The result shares no memory with its inputs, so Megatron may free its storage after sending it.
    """
    return torch.cat((hidden_states, _ToColumns.apply(kv, hidden_states.shape[0], hidden_states.dtype, fp32)), dim=-1)


def split_boundary_tensor(
    boundary_tensor: Tensor, hidden_size: int, length: int, groups: int, fp32: bool = False
) -> tuple[Tensor, Tensor]:
    """[rows, b, h + columns] -> hidden [rows, b, h] and K,V [length, b, G, 2, D] (fp32 if `fp32`), each contiguous."""
    hidden_states, columns = boundary_tensor.split((hidden_size, boundary_tensor.shape[-1] - hidden_size), dim=-1)
    return hidden_states.contiguous(), _FromColumns.apply(columns, length, groups, fp32)


def _to_columns(kv: Tensor, rows: int, dtype: torch.dtype, fp32: bool) -> Tensor:
    length, batch = kv.shape[:2]
    kv = kv.reshape(length, batch, -1)
    kv = kv.view(dtype) if fp32 else kv
    return kv.view(length // rows, rows, batch, -1).permute(1, 2, 0, 3).reshape(rows, batch, -1)


def _from_columns(columns: Tensor, length: int, groups: int, fp32: bool) -> Tensor:
    rows, batch, _ = columns.shape
    kv = columns.reshape(rows, batch, length // rows, -1).permute(2, 0, 1, 3).reshape(length, batch, -1)
    kv = kv.contiguous().view(torch.float32) if fp32 else kv
    return kv.reshape(length, batch, groups, 2, -1)


class _ToColumns(torch.autograd.Function):
    """The inverse of `_FromColumns`, for values and for gradients; fp32 gradients stay fp32."""

    @staticmethod
    def forward(ctx, kv, rows, dtype, fp32):
        ctx.shape, ctx.fp32 = kv.shape, fp32
        return _to_columns(kv, rows, dtype, fp32)

    @staticmethod
    def backward(ctx, gradient):
        length, _, groups, _, _ = ctx.shape
        return _from_columns(gradient, length, groups, ctx.fp32), None, None, None


class _FromColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns, length, groups, fp32):
        ctx.rows, ctx.fp32, ctx.dtype = columns.shape[0], fp32, columns.dtype
        return _from_columns(columns, length, groups, fp32).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        return _to_columns(gradient.contiguous(), ctx.rows, ctx.dtype, ctx.fp32), None, None, None
