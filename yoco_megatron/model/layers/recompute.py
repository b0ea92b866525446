"""Outputs that are made again in backward instead of kept.

A linear layer keeps its input for its weight's gradient. Where that input is a cheap function of what is kept anyway,
its memory is given back after the layer has run, and filled again when the gradient of the layer's output is there.
Autograd is not involved: the operation that made the input must not need its own output, as SwiGLU does not.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor


def check_whole(value: Tensor) -> None:
    """AssertionError for a part of a storage."""
    assert value.untyped_storage().nbytes() == value.nbytes, "a view cannot be freed"


def give_back(value: Tensor) -> None:
    """Free the memory of `value`, a whole storage of its own, until `fill_again`."""
    check_whole(value)
    value.untyped_storage().resize_(0)


def fill_again(value: Tensor, write: Callable[[Tensor], None]) -> None:
    """Give `value` its memory again, and let `write` put the values there."""
    value.untyped_storage().resize_(value.nbytes)
    with torch.no_grad():
        write(value.data)  # .data: autograd must not take it for a change of a saved tensor


def remake_in_backward(value: Tensor, reader_output: Tensor, remake: Callable[[Tensor], None]) -> None:
    """Free the memory of `value` until backward needs it.

    Args:
        value: what the reader was given; a whole storage of its own, that nothing but the reader needs.
        reader_output: the reader's output. Its gradient comes right before the reader's backward.
        remake: writes the values into a tensor like `value`, by the same operations, so that they are the same bits.
    """
    check_whole(value)
    if not reader_output.requires_grad:
        return
    give_back(value)
    held = [(value, remake)]

    def restore(_: Tensor) -> None:
        if not held:  # a second backward of a kept graph
            return
        fill_again(*held.pop())

    reader_output.register_hook(restore)


@dataclass
class _Kept:
    """A graph from `query`, whose memory may be given back, to `output`."""

    query: Tensor
    output: Tensor


class KeptAttention:
    """What the attention of each layer gave, of one micro-batch.

    Args:
        fp8: the layers run inside Transformer Engine's FP8 context. Attention is not in FP8, but would leave its scales
            for a second pass that never comes.
    """

    def __init__(self, fp8: bool = False) -> None:
        self._fp8 = fp8
        self._of_layer: dict[int, _Kept] = {}

    def __call__(self, layer: int, attention: Callable[[Tensor], Tensor], query: Tensor) -> Tensor:
        """attention(query), computed once.

        Args:
            layer: its number.
            attention: what else it reads must take its gradient by itself. It may move the random generator, as fused
                attention does even without dropout, so nothing after it may draw from that in the second pass.
            query: its own whole storage, which nothing else reads in the first pass.
        """
        if not torch.is_grad_enabled():
            self._of_layer[layer] = kept = self._record(attention, query)
            return kept.output.detach()
        kept = self._of_layer.pop(layer, None)
        # Nothing is kept where the layer is in no checkpoint, or the graph runs backward again.
        return attention(query) if kept is None else _Replay.apply(query, kept)

    def _record(self, attention: Callable[[Tensor], Tensor], query: Tensor) -> _Kept:
        query = query.detach().requires_grad_()
        with torch.enable_grad(), _without_fp8() if self._fp8 else nullcontext():
            output = attention(query)
        give_back(query)
        return _Kept(query, output)


def _without_fp8() -> AbstractContextManager:
    from transformer_engine.pytorch import autocast

    return autocast(enabled=False)


class _Replay(torch.autograd.Function):
    """The recorded graph as one node: the kept output; backward through the graph, with its queries filled again."""

    @staticmethod
    def forward(ctx, query: Tensor, kept: _Kept) -> Tensor:
        fill_again(kept.query, lambda memory: memory.copy_(query))
        ctx.kept = kept
        return kept.output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        kept, ctx.kept = ctx.kept, None  # freed before the layers below it run backward
        torch.autograd.backward(kept.output, gradient)
        return kept.query.grad, None
