"""Attention that full recompute does not compute again: its output is kept, and all around it is made again.

Over a long sequence attention is most of a layer's work, and its output, with a sum for each query, is as small as the
layer's input, which full recompute keeps anyway. (Packed documents of several samples are laid end to end for the
kernel: then its queries, keys and values are copies, and kept, too.) Megatron's checkpoint knows whole layers only. So
the first pass, which autograd does not follow, records a graph of the attention alone, and gives back the memory of its
queries; the second pass, in backward, fills them again and hands the graph on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_megatron.model.remade import fill_again, give_back


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
