"""Activations recomputed in backward, beyond what Megatron's checkpoints can do.

1. `recompute_in_backward` (--recompute-elementwise). A linear layer saves its input for the weight gradient. If that is
   cheap to recompute from what is saved anyway, free it after forward and refill it when the gradient of the layer's
   output arrives. Autograd is not involved: the operation that made the input must not need its own output, as SwiGLU
   does not.
2. `AttentionOutputStore` (--keep-cross-attention). Full activation recompute that stores cross-attention outputs: in
   the second pass of a checkpointed layer the attention is not recomputed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


def check_whole(value: Tensor) -> None:
    """AssertionError if `value` is a view of a larger storage."""
    assert value.untyped_storage().nbytes() == value.nbytes, "a view cannot be freed"


def free_storage(value: Tensor) -> None:
    """Free the memory of `value`, a whole storage of its own, until `refill_storage`."""
    check_whole(value)
    value.untyped_storage().resize_(0)


def refill_storage(value: Tensor, write: Callable[[Tensor], object]) -> None:
    """Allocate the memory of `value` again, and let `write` put the values there."""
    value.untyped_storage().resize_(value.nbytes)
    with torch.no_grad():
        write(value.data)  # .data: autograd must not take it for a change of a saved tensor


def recompute_in_backward(value: Tensor, reader_output: Tensor, recompute_into: Callable[[Tensor], object]) -> None:
    """Free the memory of `value` until backward needs it.

    Args:
        value: the reader's input; a whole storage of its own, which nothing but the reader needs.
        reader_output: the reader's output. Its gradient arrives right before the reader's backward runs.
        recompute_into: writes the values into a tensor like `value`, by the same operations, so bit for bit.
    Raises:
        AssertionError: `value` is a view.
    """
    check_whole(value)
    if not reader_output.requires_grad:
        return
    free_storage(value)
    freed = [(value, recompute_into)]

    def restore(_: Tensor) -> None:
        if not freed:  # a second backward through a retained graph
            return
        refill_storage(*freed.pop())

    reader_output.register_hook(restore)


@dataclass
class _Stored:
    """A graph from `query`, whose memory may be freed, to `output`."""

    query: Tensor
    output: Tensor


class AttentionOutputStore:
    """The attention outputs of the layers of one micro-batch.

    Args:
        fp8: the layers run inside Transformer Engine's FP8 context. Attention is not in FP8, but would leave its scales
            for a second pass that never comes.
    """

    def __init__(self, fp8: bool = False) -> None:
        self._fp8 = fp8
        self._by_layer: dict[int, _Stored] = {}

    def __call__(self, layer: int, attention: Callable[[Tensor], Tensor], query: Tensor) -> Tensor:
        """attention(query), computed once: stored in the first pass of a checkpoint, returned in the second.

        Args:
            layer: its number.
            attention: what else it reads must collect its gradient by itself. It may advance the random generator, as
                fused attention does even without dropout, so nothing after it may draw from it in the second pass.
            query: its own whole storage, which nothing else reads in the first pass.
        """
        if not torch.is_grad_enabled():
            recorded = self._by_layer[layer] = self._record(attention, query)
            return recorded.output.detach()
        stored = self._by_layer.pop(layer, None)
        # Nothing is stored if the layer is in no checkpoint, or if the graph runs backward again.
        return attention(query) if stored is None else _Replay.apply(query, stored)

    def _record(self, attention: Callable[[Tensor], Tensor], query: Tensor) -> _Stored:
        query = query.detach().requires_grad_()
        with torch.enable_grad(), _without_fp8() if self._fp8 else nullcontext():
            output = attention(query)
        free_storage(query)
        return _Stored(query, output)


def _without_fp8() -> AbstractContextManager:
    from transformer_engine.pytorch import autocast

    return autocast(enabled=False)


class _Replay(torch.autograd.Function):
    """The recorded graph as one node: forward returns the stored output, backward runs through the graph, whose
    queries are refilled."""

    @staticmethod
    def forward(ctx, query: Tensor, stored: _Stored) -> Tensor:
        refill_storage(stored.query, lambda memory: memory.copy_(query))
        ctx.stored = stored
        return stored.output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        stored, ctx.stored = ctx.stored, None  # freed before the layers below run backward
        torch.autograd.backward(stored.output, gradient)
        return stored.query.grad, None
