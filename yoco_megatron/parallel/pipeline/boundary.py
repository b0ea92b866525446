"""The boundary tensor of two pipeline stages: hidden states, and once they are made the shared K,V, in one tensor.

    [s, b, h]                          before the shared K,V are made
    [1, b, m h + n s 2 G D + m W]      after: hidden states of m queries, then n sets of K,V, laid end to end; then the
                                       memory of gated memory units

n sets that later layers read, G K,V heads of this tensor-parallel rank, D head width, W values of the memory, of which
there are none if no later layer is a unit, and m is s up to the last layer of the self-decoder. With sequence
parallelism the hidden states are [m/tp, b, h], while each rank holds its heads of K,V and memory for all s or m tokens.
`fp32` sends K,V and memory as fp32 bits in twice the 16-bit values, so that their gradients, which have the tensor's
shape, travel back unrounded.
"""

from collections.abc import Sequence
from math import prod

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor


def kv_values(kv_shape: tuple[int, ...], fp32: bool) -> int:
    """16-bit values (else those of the boundary tensor's dtype) that a set of K,V, or the memory, takes in a boundary
    tensor."""
    return prod(kv_shape) * (2 if fp32 else 1)


def join_boundary_tensor(hidden_states: Tensor, shared: Sequence[Tensor], fp32: bool = False) -> Tensor:
    """hidden [rows, b, h], sets of K,V [s, b, G, 2, D] and memory [m, b, W] (fp32 if `fp32`) -> a fresh tensor
    [1, b, values].

    The result shares no memory with its inputs, so Megatron may free its storage after sending it.
    """
    values = [_ToBits.apply(kv, hidden_states.dtype) if fp32 else kv for kv in shared]
    flat = torch.cat([x.reshape(-1) for x in (hidden_states, *values)])
    return make_viewless_tensor(flat.view(1, hidden_states.shape[1], -1), flat.requires_grad, keep_graph=True)


def split_boundary_tensor(
    boundary_tensor: Tensor, hidden_shape: tuple[int, ...], shapes: Sequence[tuple[int, ...]], fp32: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """[1, b, values] -> hidden states, and K,V and memory (fp32 if `fp32`) of these shapes: views, not copies."""
    sizes = prod(hidden_shape), *(kv_values(shape, fp32) for shape in shapes)
    hidden_states, *shared = boundary_tensor.view(-1).split(sizes)
    parts = [(_FromBits.apply(x) if fp32 else x).view(shape) for x, shape in zip(shared, shapes)]
    return hidden_states.view(hidden_shape), parts


def to_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 as it travels in a boundary tensor of `dtype`, unrounded: see `kv_values`."""
    return _ToBits.apply(x, dtype) if dtype.itemsize == 2 else x.to(dtype)


def from_bits(values: Tensor) -> Tensor:
    """What `to_bits` was given."""
    return _FromBits.apply(values) if values.dtype.itemsize == 2 else values


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
