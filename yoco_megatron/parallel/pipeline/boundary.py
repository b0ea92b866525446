"""The boundary tensor of two pipeline stages: hidden states, and once they are made the shared K,V, in one tensor.

    [s, b, h]                          before the shared K,V are made
    [1, b, m h + s 2 G D]              after: hidden states of m queries, then K,V, laid end to end

G K,V heads of this tensor-parallel rank, D head width. With sequence parallelism the hidden states are [m/tp, b, h],
while each rank holds its K,V heads for all s tokens. `fp32` sends K,V as fp32 bits in twice the 16-bit values, so that
their gradients, which have the tensor's shape, travel back unrounded.
"""

from math import prod

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


def kv_values(kv_shape: tuple[int, ...], fp32: bool) -> int:
    """16-bit values (else those of the boundary tensor's dtype) that the K,V take in a boundary tensor."""
    return prod(kv_shape) * (2 if fp32 else 1)


def join_boundary_tensor(hidden_states: Tensor, kv: Tensor, fp32: bool = False) -> Tensor:
    """hidden [rows, b, h] and K,V [s, b, G, 2, D] (fp32 if `fp32`) -> a fresh tensor [1, b, values].

    The result shares no memory with its inputs, so Megatron may free its storage after sending it.
    """
    values = _ToBits.apply(kv, hidden_states.dtype) if fp32 else kv
    flat = torch.cat((hidden_states.reshape(-1), values.reshape(-1)))
    return make_viewless_tensor(flat.view(1, kv.shape[1], -1), flat.requires_grad, keep_graph=True)


def split_boundary_tensor(
    boundary_tensor: Tensor, hidden_shape: tuple[int, ...], kv_shape: tuple[int, ...], fp32: bool = False
) -> tuple[Tensor, Tensor]:
    """[1, b, values] -> hidden states and K,V (fp32 if `fp32`) of these shapes: views, not copies."""
    hidden_states, kv = boundary_tensor.view(-1).split((prod(hidden_shape), kv_values(kv_shape, fp32)))
    return hidden_states.view(hidden_shape), (_FromBits.apply(kv) if fp32 else kv).view(kv_shape)


class _ToBits(torch.autograd.Function):
    """fp32 -> the same bits as 16-bit numbers, twice as many in the last dimension; so are gradients, backwards."""

    @staticmethod
    def forward(ctx, x, dtype):
        return x.contiguous().view(dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous().view(torch.float32), None


class _FromBits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, bits):
        ctx.dtype = bits.dtype
        return bits.view(torch.float32)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.contiguous().view(ctx.dtype)
