"""The positions whose loss counts, and how the cross-decoder's queries at them are dealt to ranks.

A YOCO's cross-decoder writes nothing that other positions read: all K,V come from the self-decoder. So cross-decoder,
head and loss are computed at the positions with loss alone, the queries, in runs of neighbouring positions.

Zig-zag would leave a suffix of the sequence on one context-parallel rank. Therefore all queries of a micro-batch are
cut into 2 C equal pieces, and rank r gets pieces r and 2 C - 1 - r, whatever tokens it holds. Their hidden states
travel there once, in one all-to-all; with sequence parallelism over the tensor-parallel ranks as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from yoco_megatron.parallel.context.host_copy import to_device
from yoco_megatron.parallel.context.sequence_shard import CPChunk, SequenceShard, VisibleKeys, rank_major_rows

Runs = Sequence[tuple[int, int]]
"""Positions [start, stop) of a whole sequence, ascending and apart."""

FP8_ROWS = 32
"""Rows of an FP8 product are a multiple of it, whatever the recipe."""


def count(runs: Runs) -> int:
    """Number of positions."""
    return sum(stop - start for start, stop in runs)


def queries_multiple(config: Any) -> int:
    """What the number of queries of a sequence must be a multiple of, by a YOCOConfig or the arguments of a run."""
    ranks = config.context_parallel_size
    rows_split = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return lcm(2 * ranks if ranks > 1 else 1, ranks * rows_split) * (FP8_ROWS if config.fp8 else 1)


def suffix_run(queries: int, length: int, multiple: int = 1) -> Runs:
    """The run of the last positions of a sequence: `queries`, rounded up to a multiple."""
    return ((length - min(length, -(-queries // multiple) * multiple), length),)


def dealt_runs(runs: Runs, ranks: int, rank: int) -> Runs:
    """The part of `runs` that context-parallel rank `rank` computes, in its order: piece `rank`, then its mirror."""
    if ranks == 1:
        return tuple(runs)
    piece, left = divmod(count(runs), 2 * ranks)
    assert left == 0, f"{count(runs)} queries are no multiple of two pieces for each of {ranks} ranks"
    return tuple(part for index in (rank, 2 * ranks - 1 - rank) for part in _cut(runs, index * piece, piece))


def _cut(runs: Runs, first: int, count: int) -> Runs:
    """Queries first .. first + count - 1 of the runs laid end to end."""
    parts, offset = [], 0
    for start, stop in runs:
        begin, end = max(first, offset), min(first + count, offset + stop - start)
        if begin < end:
            parts.append((start + begin - offset, start + end - offset))
        offset += stop - start
    return parts


def positions_of(runs: Runs, device: torch.device | str = "cpu") -> Tensor:
    """int64 [queries]."""
    if len(runs) == 1:
        return torch.arange(*runs[0], device=device)
    edges = torch.tensor(runs)
    lengths = edges[:, 1] - edges[:, 0]
    skipped = to_device(edges[:, 0] - lengths.cumsum(0) + lengths, device)
    queries = count(runs)
    return torch.arange(queries, device=device) + skipped.repeat_interleave(
        to_device(lengths, device), output_size=queries
    )


class QueryShard:
    """The queries of a micro-batch that one context-parallel rank computes; cross attention reads it like a
    `SequenceShard`, whose chunks are here of any length.

    Args:
        shard: the tokens that this rank holds.
        runs: all queries of a sequence; their number is a multiple of `queries_multiple`.
        rows_group: the ranks that hold rows of one hidden state: with sequence parallelism the tensor-parallel ranks,
            times the context-parallel ones; None for one.
        rows_split: tensor-parallel ranks that split the rows, 1 without sequence parallelism.
    """

    def __init__(
        self,
        shard: SequenceShard,
        runs: Runs,
        rows_group: dist.ProcessGroup | None = None,
        rows_split: int = 1,
    ) -> None:
        self.whole = shard
        self.rows = _Rows(shard.length, shard.ranks, rows_split)
        self.all_runs = tuple(runs)
        self.group = rows_group if rows_group is not None and rows_group.size() > 1 else None
        self.rank, self.device = shard.rank, shard.device
        self.runs = dealt_runs(runs, shard.ranks, shard.rank)
        self.chunks = tuple(CPChunk(start, stop) for start, stop in self.runs)

    def visible_keys(self, chunk: CPChunk, left_window: int | None) -> VisibleKeys:
        """What the queries of a run attend to, without documents: see `SequenceShard.visible_keys`."""
        return self.whole.visible_keys(chunk, left_window)

    def positions(self) -> Tensor:
        """Positions of the queries of this rank, counted in each document: int64 [m], with documents [m, b]."""
        return self.whole.positions_in_documents().index_select(0, positions_of(self.runs, self.device))

    def take(self, hidden_states: Tensor) -> Tensor:
        """Hidden states of the tokens held here [s, b, h] -> those of the queries dealt here [m, b, h].

        With sequence parallelism [s/tp, b, h] -> [m/tp, b, h].
        """
        return _Take.apply(hidden_states, _route(self.rows, self.all_runs, self.rank, self.group, self.device))

    def take_whole(self, memory: Tensor) -> Tensor:
        """The same of what each tensor-parallel rank holds for all tokens, with sequence parallelism, too."""
        group = self.whole.group if self.whole.ranks > 1 else None
        rows = replace(self.rows, rows_split=1)
        return _Take.apply(memory, _route(rows, self.all_runs, self.rank, group, self.device))


@dataclass(frozen=True)
class _Rows:
    """Which rank holds the hidden state of each position of a sequence, in which row: zig-zag, and rows split."""

    length: int
    ranks: int
    rows_split: int

    def holder(self, positions: Tensor) -> Tensor:
        """Rank in the group of a `QueryShard`."""
        return rank_major_rows(positions, self.length, self.ranks) // self._held

    def row(self, positions: Tensor) -> Tensor:
        """On that rank."""
        return rank_major_rows(positions, self.length, self.ranks) % self._held

    @property
    def _held(self) -> int:
        return self.length // self.ranks // self.rows_split


@dataclass(frozen=True)
class _Route:
    """Rows that this rank sends, in the order of the receiving ranks, and how it sorts what it receives."""

    sent: Tensor
    group: dist.ProcessGroup | None = None
    sent_counts: Sequence[int] = ()
    received_counts: Sequence[int] = ()
    order: Tensor | None = None
    """Where in what is received (by sending rank) each query is."""


@lru_cache(maxsize=2)  # with --loss-suffix all micro-batches have one route
def _route(rows: _Rows, runs: Runs, rank: int, group: dist.ProcessGroup | None, device: torch.device | str) -> _Route:
    if group is None:
        return _Route(positions_of(runs, device))
    me, split = group.rank(), rows.rows_split
    assert me // split == rank, "ranks are not in the order tensor, context"
    dealt = [positions_of(dealt_runs(runs, rows.ranks, one)) for one in range(rows.ranks)]
    wanted = [part for positions in dealt for part in positions.chunk(split)]
    sent = [rows.row(part)[rows.holder(part) == me] for part in wanted]
    holders = rows.holder(wanted[me])
    return _Route(
        to_device(torch.cat(sent), device),
        group,
        [len(part) for part in sent],
        holders.bincount(minlength=group.size()).tolist(),
        to_device(holders.argsort(stable=True).argsort(), device),
    )


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, route: _Route) -> Tensor:
        ctx.route, ctx.shape = route, hidden_states.shape
        sent = hidden_states.index_select(0, route.sent)
        if route.order is None:
            return sent
        received = sent.new_empty(sum(route.received_counts), *sent.shape[1:])
        dist.all_to_all_single(received, sent, route.received_counts, route.sent_counts, group=route.group)
        return received.index_select(0, route.order)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        route = ctx.route
        if route.order is not None:
            by_sender = torch.empty_like(gradient).index_copy_(0, route.order, gradient)
            gradient = gradient.new_empty(sum(route.sent_counts), *gradient.shape[1:])
            dist.all_to_all_single(gradient, by_sender, route.sent_counts, route.received_counts, group=route.group)
        return gradient.new_zeros(ctx.shape).index_copy_(0, route.sent, gradient), None
