"""Queries on the way to the keys of all context-parallel ranks, and what they found on the way back.

Every rank joins each of these collectives, one for all tensors that travel together. Whatever their dtypes, their bits
go as int32, which is copied faster than single bytes; RoPE makes widths even, so that 16-bit numbers fit.
"""

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from yoco_megatron.parallel.context.kv_gather import gather_rank_major
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


def gather_queries(shard: SequenceShard, *dealt: Tensor) -> list[Tensor]:
    """Rows [m/C, b, H, D] of the queries dealt to each rank -> of all queries [m, b, H, D], in sequence order.

    The tensors may differ in D and dtype. Two equal pieces lie on each rank, as chunks of tokens do (`dealt_runs`).
    """
    gathered = _split_bits(gather_rank_major(_join_bits(dealt), shard), dealt)
    return [shard.to_sequence_order(part).view(like.dtype) for part, like in zip(gathered, dealt)]


def return_to_ranks(shard: SequenceShard, *found: Tensor) -> list[Tensor]:
    """What this rank found for all queries, [m, b, H, D] in sequence order -> what each rank found for the queries
    dealt to this one, [C, m/C, b, H, D]."""
    rank_major = shard.to_rank_major(_join_bits(found))
    received = torch.empty_like(rank_major)
    dist.all_to_all_single(received, rank_major, group=shard.group)
    received = received.unflatten(0, (shard.ranks, -1))
    return [part.contiguous().view(like.dtype) for part, like in zip(_split_bits(received, found), found)]


def _join_bits(tensors: tuple[Tensor, ...]) -> Tensor:
    """int32: the bits of each row, side by side."""
    return torch.cat([x.contiguous().view(torch.int32) for x in tensors], -1)


def _split_bits(message: Tensor, likes: tuple[Tensor, ...]) -> list[Tensor]:
    """The bits of each tensor, views."""
    edges = [0, *accumulate(like.shape[-1] * like.itemsize // 4 for like in likes)]
    return [message[..., start:stop] for start, stop in pairwise(edges)]
