"""The shared K,V of context-parallel ranks: gathered once a stage, and their gradient back.

Every rank joins both collectives, forward and backward. Chunks are those of `SequenceShard`.
"""

import torch.distributed as dist
from torch import Tensor

from yoco_megatron.parallel.context.sequence_shard import SequenceShard


def gather_chunks(x: Tensor, shard: SequenceShard) -> Tensor:
    """[s, ...] of every rank -> [length, ...], tokens in their order: one all-gather and one copy."""
    held = x.new_empty(shard.length, *x.shape[1:])
    dist.all_gather_into_tensor(held, x.contiguous(), group=shard.group)
    return shard.in_order(held)


def reduce_scatter_chunks(held: Tensor, shard: SequenceShard) -> Tensor:
    """Sum over ranks of [length, ...], chunks in the order in which ranks hold them -> this rank's [s, ...]."""
    x = held.new_empty(shard.local_length, *held.shape[1:])
    dist.reduce_scatter_tensor(x, held, group=shard.group)
    return x
