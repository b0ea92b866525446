"""The shared K,V of context-parallel ranks, gathered once per stage, and the reduce-scatter of their gradient.

Every rank joins both collectives, forward and backward.
"""

import torch.distributed as dist
from torch import Tensor

from yoco_megatron.parallel.context.sequence_shard import SequenceShard


def gather_rank_major(x: Tensor, shard: SequenceShard) -> Tensor:
    """[s, ...] of every rank -> [ranks * s, ...] in rank-major order: one all-gather."""
    rank_major = x.new_empty(shard.ranks * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(rank_major, x.contiguous(), group=shard.group)
    return rank_major


def gather_chunks(x: Tensor, shard: SequenceShard) -> Tensor:
    """[s, ...] of every rank -> [length, ...] in sequence order: one all-gather and one copy."""
    return shard.to_sequence_order(gather_rank_major(x, shard))


def reduce_scatter_chunks(rank_major: Tensor, shard: SequenceShard) -> Tensor:
    """Sum [length, ...] over ranks, chunks in rank-major order -> this rank's [s, ...], in the same dtype."""
    x = rank_major.new_empty(shard.local_length, *rank_major.shape[1:])
    dist.reduce_scatter_tensor(x, rank_major, group=shard.group)
    return x
