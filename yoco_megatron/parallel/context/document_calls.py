"""Causal attention over packed documents in one call of the kernels, planned on the host once per micro-batch.

A segment of a call is a run of neighbouring queries in one document, and its keys: the document from its first token to
the last of these queries. So the mask of each segment is causal, aligned at its lower right corner, whatever the
positions that are computed. All positions of a document are one segment, an answer is one, two answers are two, which
read the keys of their common prompt twice.

Kernels want the keys of all segments end to end, from the start of a tensor (Transformer Engine copies other views,
in every layer). As all layers read the same K,V, they are laid out so once, before the first of them, and the gradient
of what was laid out is put back once, behind the last. Where that is the order in which they are, nothing is copied.

With context parallelism the keys of a rank's segments are picked from the gathered sequence.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from yoco_megatron.parallel.context.host_copy import to_device
from yoco_megatron.parallel.context.kv_gather import gather_rank_major, reduce_scatter_chunks
from yoco_megatron.parallel.context.sequence_shard import SequenceShard, packed_segments, rank_major_rows

QUERY_TILE = 128
"""Kernels compute queries in tiles of so many. A gap below that between two runs of a document is computed as well and
thrown away, because a segment more costs a tile and a copy of its keys."""
LONG_DOCUMENT = 4096
"""Keys of a document up to which they are copied for each of its segments, which is quadratic. A longer document with
several segments is laid out once and has a call for each, which reads its start."""


@dataclass
class _Segment:
    """Queries at positions [start, stop) of one sample; keys from position `first`."""

    sample: int
    first: int
    start: int
    stop: int
    rows: list[np.ndarray]
    """Rows of the queries; a position in a gap has that of the query before."""

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True)
class _KeyRows:
    """Which rows of the gathered K,V [length * b] are laid out, in rank-major order, and how their gradient returns."""

    rows: Tensor
    additions: list[tuple[Tensor, Tensor]]
    """(rows, where they lie), each row at most once in each: so the sum does not depend on the order of atomics."""


@dataclass(frozen=True)
class DocumentCall:
    """One call of the kernels: queries that follow those of the call before, and the first rows of laid out keys."""

    num_queries: int
    laid_out: int
    num_keys: int
    packed: PackedSeqParams


@dataclass
class DocumentCalls:
    """The calls for the queries at `runs`, in this order, over the documents of `shard`.

    Attributes:
        calls: in the order of the queries that are laid out.
        query_rows: rows of the queries [m * b] that are laid out; None for all in their order.
        query_places: where each query is among them.
    """

    shard: SequenceShard
    runs: Sequence[tuple[int, int]]
    calls: list[DocumentCall] = field(default_factory=list)
    query_rows: Tensor | None = None
    query_places: Tensor | None = None
    _key_rows: list[_KeyRows | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        shared: list[list[_Segment]] = []
        alone: list[list[_Segment]] = []
        for sample, starts in enumerate(self.shard.document_starts):
            for document in _segments(sample, starts, self.runs):
                is_long = len(document) > 1 and document[-1].keys > LONG_DOCUMENT
                (alone if is_long else shared).append(document)
        segments = [segment for document in shared for segment in document]
        if segments:
            self._lay_out(segments, [len(document) - place for document in shared for place in range(len(document))])
            self._call(segments, sum(segment.keys for segment in segments))
        for document in alone:
            self._lay_out(document[-1:], [1])
            for segment in document:
                self._call([segment], segment.keys)
        batch = self.shard.batch
        in_calls = [*segments, *(segment for document in alone for segment in document)]
        rows = np.concatenate([row * batch + segment.sample for segment in in_calls for row in segment.rows])
        if not _counts_up(rows):
            places = np.empty(batch * sum(stop - start for start, stop in self.runs), np.int64)
            places[rows[::-1]] = np.arange(len(rows))[::-1]  # of equal rows the first: the others are in gaps
            self.query_rows, self.query_places = self._index(rows), self._index(places)

    def _lay_out(self, segments: list[_Segment], turns: list[int]) -> None:
        """`turns`: segments of one document have different ones, 1 for the last."""
        shard = self.shard
        positions = np.concatenate([np.arange(segment.first, segment.stop) for segment in segments])
        samples = np.repeat([segment.sample for segment in segments], [segment.keys for segment in segments])
        rows = rank_major_rows(positions, shard.length, shard.ranks) * shard.batch + samples
        if shard.ranks == 1 and shard.batch == 1 and _counts_up(rows):
            self._key_rows.append(None)
            return
        turn = np.repeat(turns, [segment.keys for segment in segments])
        places = [np.flatnonzero(turn == one) for one in range(1, max(turns) + 1)]
        additions = [(self._index(rows[place]), self._index(place)) for place in places]
        self._key_rows.append(_KeyRows(self._index(rows), additions))

    def _call(self, segments: list[_Segment], num_keys: int) -> None:
        queries = list(accumulate(map(len, segments), initial=0))
        keys = list(accumulate((segment.keys for segment in segments), initial=0))
        packed = packed_segments(queries, keys, self.shard.device)
        self.calls.append(DocumentCall(queries[-1], len(self._key_rows) - 1, num_keys, packed))

    def _index(self, rows: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(rows), self.shard.device)

    @property
    def in_place(self) -> list[bool]:
        """For each tensor of keys: whether it is the start of the K,V themselves."""
        return [rows is None for rows in self._key_rows]

    def lay_out(self, kv: Tensor) -> list[Tensor]:
        """K,V of the tokens held here [s, b, ...] -> copies [n, 1, ...], of each tensor of keys not `in_place`."""
        if all(self.in_place):
            return []
        whole = (gather_rank_major(kv, self.shard) if self.shard.ranks > 1 else kv).flatten(0, 1)
        return [whole.index_select(0, keys.rows).unsqueeze(1) for keys in self._key_rows if keys is not None]

    def put_back(self, gradients: list[Tensor]) -> Tensor | None:
        """The gradient of `lay_out`, summed in the dtype of `gradients`; None if there are no copies."""
        if all(self.in_place):
            return None
        shard = self.shard
        whole = gradients[0].new_zeros(shard.length * shard.batch, *gradients[0].shape[2:])
        for keys, gradient in zip(filter(None, self._key_rows), gradients):
            for rows, places in keys.additions:
                part = gradient.squeeze(1)
                whole.index_add_(0, rows, part if len(places) == len(part) else part.index_select(0, places))
        whole = whole.unflatten(0, (shard.length, shard.batch))
        return reduce_scatter_chunks(whole, shard) if shard.ranks > 1 else whole


def _segments(sample: int, starts: list[int], runs: Iterable[tuple[int, int]]) -> list[list[_Segment]]:
    """Of the documents of one sample that have queries, document by document."""
    documents: dict[int, list[_Segment]] = {}
    row = 0
    for run_start, run_stop in runs:
        next_document = bisect_right(starts, run_start)
        cuts = starts[next_document : bisect_left(starts, run_stop)]
        for start, stop in pairwise([run_start, *cuts, run_stop]):
            first = starts[next_document - 1]
            next_document += 1
            rows = np.arange(row, row + stop - start)
            row += stop - start
            before = documents.setdefault(first, [])
            if before and start - before[-1].stop < QUERY_TILE:
                gap = np.full(start - before[-1].stop, before[-1].rows[-1][-1])
                before[-1].rows += [gap, rows]
                before[-1].stop = stop
            else:
                before.append(_Segment(sample, first, start, stop, [rows]))
    return list(documents.values())


def _counts_up(rows: np.ndarray) -> bool:
    """Whether the rows are 0, 1, 2, ..."""
    return np.array_equal(rows, np.arange(len(rows)))
