"""What context-parallel ranks exchange for attention (docs/context_parallel.md has the bytes; retention.py the states).

    window    the last keys and values before each chunk: `keys_with_halo`
    cross     the shared K,V, once a stage: `gather_chunks`, and their gradient back: `reduce_scatter_chunks`

Each exchange is one collective that every rank joins, forward and backward, whatever it has to give or to get: a rank
that autograd let skip one would leave the others waiting. Chunks are those of `SequenceShard`.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from yoco_megatron.parallel.context.sequence_shard import SequenceShard


def keys_with_halo(key: Tensor, value: Tensor, reach: int, shard: SequenceShard) -> tuple[Tensor, ...]:
    """For each chunk held here the `reach` keys that precede it, then its own; and its values likewise.

    Args:
        key, value: [s, b, G, D].
    Returns:
        (keys, values of the first chunk, keys, values of the second), [halo + chunk, b, G, D] each; at the sequence's
        start the halo is shorter, or none.
    """
    return _KeysWithHalo.apply(key, value, reach, shard)


@dataclass(frozen=True)
class _Piece:
    """Rows of a halo that lie in one chunk.

    They go to row `place` of the halo of a rank's chunk number `slot`, and come from row `row` of rank `source`.
    """

    slot: int
    place: int
    source: int
    row: int
    rows: int


def _pieces(shard: SequenceShard, reach: int, rank: int) -> list[_Piece]:
    """All pieces of the halos of `rank`."""
    pieces = []
    for slot, index in enumerate(shard.chunks_of(rank)):
        start = shard.chunk(index).start
        for held, place, rows in shard.spans(max(0, start - reach), start):
            source, row = divmod(held, shard.local_length)
            pieces.append(_Piece(slot, place, source, row, rows))
    return pieces


def _pairs(key: Tensor, value: Tensor) -> Tensor:
    return torch.stack((key, value), dim=3)


class _KeysWithHalo(torch.autograd.Function):
    """One all-to-all each way; chunks' own rows are copied while it runs."""

    @staticmethod
    def forward(ctx, key, value, reach, shard):
        ranks = range(shard.ranks)
        wanted = [_pieces(shard, reach, rank) for rank in ranks]
        sent = [[piece for piece in wanted[rank] if piece.source == shard.rank] for rank in ranks]
        received = [[piece for piece in wanted[shard.rank] if piece.source == rank] for rank in ranks]
        sizes = [sum(piece.rows for piece in wanted[shard.rank] if piece.slot == slot) for slot in (0, 1)]
        ctx.shard, ctx.sent, ctx.received, ctx.sizes = shard, sent, received, sizes

        rows = [
            _pairs(*(x.narrow(0, piece.row, piece.rows) for x in (key, value))) for pieces in sent for piece in pieces
        ]
        arrived, work = _exchange(rows or [_pairs(key[:0], value[:0])], sent, received, shard)
        chunks = []
        for size, *own in zip(sizes, key.chunk(2), value.chunk(2)):
            chunks.append([torch.cat((x.new_empty(size, *x.shape[1:]), x)) for x in own])
        work.wait()
        for piece, pairs in _split(arrived, received):
            for x, part in zip(chunks[piece.slot], pairs.unbind(3)):
                x.narrow(0, piece.place, piece.rows).copy_(part)
        return (*chunks[0], *chunks[1])

    @staticmethod
    def backward(ctx, *gradients):
        chunks = gradients[:2], gradients[2:]
        rows = [
            _pairs(*(x.narrow(0, piece.place, piece.rows) for x in chunks[piece.slot]))
            for pieces in ctx.received
            for piece in pieces
        ]
        empty = _pairs(*(x[:0] for x in chunks[0]))
        arrived, work = _exchange(rows or [empty], ctx.received, ctx.sent, ctx.shard)
        own = [torch.cat([chunk[part][size:] for chunk, size in zip(chunks, ctx.sizes)]) for part in (0, 1)]
        work.wait()
        for piece, pairs in _split(arrived, ctx.sent):
            for x, part in zip(own, pairs.unbind(3)):
                x.narrow(0, piece.row, piece.rows).add_(part)
        return *own, None, None


def _exchange(
    parts: list[Tensor], sent: list[list[_Piece]], received: list[list[_Piece]], shard: SequenceShard
) -> tuple[Tensor, dist.Work]:
    """Start the all-to-all of rows, ordered by the rank that they go to."""
    rows = torch.cat(parts)
    send, receive = ([sum(piece.rows for piece in pieces) for pieces in by_rank] for by_rank in (sent, received))
    arrived = rows.new_empty(sum(receive), *rows.shape[1:])
    return arrived, dist.all_to_all_single(arrived, rows, receive, send, group=shard.group, async_op=True)


def _split(rows: Tensor, by_rank: list[list[_Piece]]) -> list[tuple[_Piece, Tensor]]:
    pieces = [piece for pieces in by_rank for piece in pieces]
    return list(zip(pieces, rows.split([piece.rows for piece in pieces])))
