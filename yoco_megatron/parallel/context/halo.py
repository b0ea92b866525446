"""Windows across context-parallel ranks: each chunk's halo, the last keys and values before it, or other rows.

One all-to-all each way (docs/context_parallel.md has the bytes). Every rank joins it, forward and backward, even with
nothing to send or to receive: a skipped collective on one rank would deadlock the others.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from yoco_megatron.parallel.context.sequence_shard import SequenceShard


def keys_with_halo(key: Tensor, value: Tensor, left_window: int, shard: SequenceShard) -> tuple[Tensor, ...]:
    """For each chunk held here the `left_window` keys that precede it, then its own; and its values likewise.

    Args:
        key, value: [s, b, G, D].
    Returns:
        (keys, values of the first chunk, keys, values of the second), [halo + chunk, b, G, D] each; at the sequence's
        start the halo is shorter, or empty.
    """
    return _WithHalo.apply(shard, _plan(shard, left_window), key, value)


def rows_with_halo(x: Tensor, left_window: int, shard: SequenceShard) -> tuple[Tensor, ...]:
    """The same of one tensor [s, b, ...]: rows of the first chunk, and of the second."""
    return _WithHalo.apply(shard, _plan(shard, left_window), x)


@dataclass(frozen=True)
class HaloSpan:
    """`num_rows` neighbouring rows of a halo, which lie in one chunk of their owner.

    They come from row `src_row` of what rank `src_rank` holds, and go to row `halo_offset` in the halo of the
    receiver's first or second chunk (`chunk` 0 or 1).
    """

    chunk: int
    halo_offset: int
    src_rank: int
    src_row: int
    num_rows: int


@dataclass(frozen=True)
class HaloPlan:
    """What one rank sends and receives in forward, spans ordered by the other rank; and the two halos' lengths."""

    sent: list[HaloSpan]
    sent_rows: list[int]
    """Rows to each rank."""
    received: list[HaloSpan]
    received_rows: list[int]
    """Rows from each rank."""
    halo_lengths: list[int]


def _plan(shard: SequenceShard, left_window: int) -> HaloPlan:
    """This rank's plan, made by the first layer of a micro-batch."""
    if left_window not in shard.halo_plans:
        ranks = range(shard.ranks)
        halos = [_spans(shard, left_window, rank) for rank in ranks]
        sent = [[span for span in halos[rank] if span.src_rank == shard.rank] for rank in ranks]
        received = [[span for span in halos[shard.rank] if span.src_rank == rank] for rank in ranks]
        own = [[span for span in halos[shard.rank] if span.chunk == chunk] for chunk in (0, 1)]
        shard.halo_plans[left_window] = HaloPlan(
            sent=[span for spans in sent for span in spans],
            sent_rows=_count_rows(sent),
            received=[span for spans in received for span in spans],
            received_rows=_count_rows(received),
            halo_lengths=_count_rows(own),
        )
    return shard.halo_plans[left_window]


def _spans(shard: SequenceShard, left_window: int, rank: int) -> list[HaloSpan]:
    """All spans of the halos of `rank`."""
    spans = []
    for chunk, index in enumerate(shard.chunks_of(rank)):
        start = shard.chunk(index).start
        for row, offset, num_rows in shard.held_spans(max(0, start - left_window), start):
            src_rank, src_row = divmod(row, shard.local_length)
            spans.append(HaloSpan(chunk, offset, src_rank, src_row, num_rows))
    return spans


def _count_rows(groups: list[list[HaloSpan]]) -> list[int]:
    return [sum(span.num_rows for span in spans) for spans in groups]


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(tuple(tensors), dim=2)


class _WithHalo(torch.autograd.Function):
    """One all-to-all each way for all tensors; each chunk's own rows are copied while it runs."""

    @staticmethod
    def forward(ctx, shard, plan, *tensors):
        ctx.shard, ctx.plan = shard, plan
        parts = [_stack(x.narrow(0, span.src_row, span.num_rows) for x in tensors) for span in plan.sent]
        parts = parts or [_stack(x[:0] for x in tensors)]
        arrived, work = _exchange(parts, plan.sent_rows, plan.received_rows, shard)
        chunks = []
        for length, *own in zip(plan.halo_lengths, *(x.chunk(2) for x in tensors)):
            chunks.append([torch.cat((x.new_empty(length, *x.shape[1:]), x)) for x in own])
        work.wait()
        for span, rows in _split(arrived, plan.received):
            for x, part in zip(chunks[span.chunk], rows.unbind(2)):
                x.narrow(0, span.halo_offset, span.num_rows).copy_(part)
        return (*chunks[0], *chunks[1])

    @staticmethod
    def backward(ctx, *gradients):
        plan, count = ctx.plan, len(gradients) // 2
        chunks = gradients[:count], gradients[count:]
        parts = [
            _stack(x.narrow(0, span.halo_offset, span.num_rows) for x in chunks[span.chunk]) for span in plan.received
        ]
        parts = parts or [_stack(x[:0] for x in chunks[0])]
        arrived, work = _exchange(parts, plan.received_rows, plan.sent_rows, ctx.shard)
        own = [
            torch.cat([x[length:] for x, length in zip(both_chunks, plan.halo_lengths)]) for both_chunks in zip(*chunks)
        ]
        work.wait()
        for span, rows in _split(arrived, plan.sent):
            for x, part in zip(own, rows.unbind(2)):
                x.narrow(0, span.src_row, span.num_rows).add_(part)
        return None, None, *own


def _exchange(
    parts: list[Tensor], sent_rows: list[int], received_rows: list[int], shard: SequenceShard
) -> tuple[Tensor, dist.Work]:
    """Start the all-to-all of `parts`, ordered by the rank that they go to; `sent_rows` go to each rank."""
    rows = torch.cat(parts)
    arrived = rows.new_empty(sum(received_rows), *rows.shape[1:])
    work = dist.all_to_all_single(arrived, rows, received_rows, sent_rows, group=shard.group, async_op=True)
    return arrived, work


def _split(rows: Tensor, spans: list[HaloSpan]) -> list[tuple[HaloSpan, Tensor]]:
    return list(zip(spans, rows.split([span.num_rows for span in spans])))
