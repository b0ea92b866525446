"""Mixtures of experts without numbers: each expert gets as many tokens as any other, those that remain go to the first.

How many rows go where follows in training from what the router says, so that neither sizes nor calls could be told.
"""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

AllGather, AllToAll = token_dispatcher.MoEAllGatherTokenDispatcher, token_dispatcher.MoEAlltoAllTokenDispatcher


def tokens_of_experts(rows: int, experts: int) -> np.ndarray:
    """[experts]: of so many rows, those of each."""
    return rows // experts + (np.arange(experts) < rows % experts)


def stand_ins() -> Iterator[Any]:
    """Context managers, for the dispatchers that plans know."""
    make, count = AllToAll.__init__, AllToAll.preprocess

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():  # the order of experts is made of numbers
            make(self, *args, **kwargs)

    def preprocess(self: Any, routing_map: Tensor) -> np.ndarray:
        """Of [tokens, experts]: how many rows this rank sends and receives, and those of its experts."""
        count(self, routing_map)  # for what it exchanges
        each = tokens_of_experts(len(routing_map) * self.config.moe_router_topk, self.num_experts)
        own = each[self.local_expert_indices]
        ranks = self.tp_size * self.ep_size
        if ranks > 1:
            self.input_splits = each.reshape(self.ep_size, -1).sum(axis=1)
            self.output_splits = np.full(self.ep_size, own.sum())
            self.output_splits_tp = np.full(self.tp_size, own.sum() * self.ep_size)
        self.num_global_tokens_per_local_expert = np.tile(own, (ranks, 1))
        return own * ranks

    yield mock.patch.multiple(AllToAll, __init__=__init__, preprocess=preprocess)
    yield mock.patch.object(AllGather, "dispatch_postprocess", _dispatch_postprocess)

    def weighted_swiglu_back(dy: Tensor, wide: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(wide), torch.empty_like(weights)

    # Megatron compiles these: each is one kernel.
    yield mock.patch.multiple(
        fused_bias_swiglu,
        weighted_swiglu=lambda wide, weights: wide.new_empty(*wide.shape[:-1], wide.shape[-1] // 2),
        weighted_swiglu_back=weighted_swiglu_back,
    )


def _dispatch_postprocess(self: Any, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, np.ndarray, Tensor]:
    """Theirs, but for the number of rows."""
    self.hidden_shape_before_permute = hidden_states.shape
    local = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
    each = tokens_of_experts(len(hidden_states) * self.router_topk, self.config.num_moe_experts)[local]
    self.local_map = self.routing_map[:, local].contiguous()
    self.local_probs = probs[:, local].contiguous()
    rows, _, self.reversed_local_input_permutation_mapping, _, _ = token_dispatcher.permute(
        hidden_states, self.local_map, num_out_tokens=each.sum()
    )
    selected = _Selected.apply(self.local_probs.T.contiguous(), self.local_map.T.contiguous(), int(each.sum()))
    self.local_probs, self.routing_map = selected, None
    return rows, each, selected


class _Selected(torch.autograd.Function):
    """torch.masked_select of as many values."""

    @staticmethod
    def forward(ctx, x: Tensor, mask: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(x, mask)
        return x.new_empty(count)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return torch.empty_like(ctx.saved_tensors[0]), None, None
