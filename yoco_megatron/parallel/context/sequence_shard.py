"""Which tokens of a sequence this process holds, and which of them belong to one document.

Context parallelism over C ranks cuts a sequence into 2 C chunks and gives rank r the chunks r and 2 C - 1 - r (zig-zag,
Megatron's data path), so that causal attention costs every rank the same. Without it there is one chunk.

Packed documents: a token attends to nothing of another document, and positions start at 0 in each.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from yoco_megatron.parallel.context.host_copy import to_device


def rank_major_rows[Positions: (int, np.ndarray, Tensor)](positions: Positions, length: int, ranks: int) -> Positions:
    """Rows of tokens in rank-major order (those of rank 0, those of rank 1, ...), by their positions in a sequence."""
    if ranks == 1:
        return positions
    chunk_length = length // (2 * ranks)
    chunk = positions // chunk_length
    place = 2 * chunk + (chunk >= ranks) * (4 * ranks - 1 - 4 * chunk)  # 2 c, or of a mirrored one 2 (2 C - 1 - c) + 1
    return place * chunk_length + positions % chunk_length


@dataclass(frozen=True)
class CPChunk:
    """Tokens [start, stop) of the whole sequence."""

    start: int
    stop: int


@dataclass(frozen=True)
class VisibleKeys:
    """The keys that the queries of one chunk attend to; the last of them is the chunk's last token.

    first: for each sample of the batch, the position of the first key that any of the queries attends to.
    packed: with documents, cu_seqlens over the samples' keys, laid end to end; else None. `ChunkedAttention` pads the
        queries on the left to as many.
    """

    first: tuple[int, ...]
    packed: PackedSeqParams | None


class SequenceShard:
    """The part of a batch of sequences that one context-parallel rank holds; one object per micro-batch.

    Args:
        length: tokens of a whole sequence.
        batch: sequences.
        document_ids: integers [b, length], the same on all ranks, equal within a document and non-decreasing; None for
            one document. From the host they are copied to the device, and nothing waits for it.
        group: the context-parallel group; None for one rank.
        device: where the tokens are.
    Raises:
        ValueError: document_ids of another shape, a length that is not a multiple of the number of chunks.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        document_ids: Tensor | None = None,
        group: torch.distributed.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.length, self.batch, self.document_ids, self.group = length, batch, document_ids, group
        self.device = device
        self.ranks, self.rank = (group.size(), group.rank()) if group is not None else (1, 0)
        self.num_chunks = 2 * self.ranks if self.ranks > 1 else 1
        if length % self.num_chunks:
            raise ValueError(f"{length} tokens do not divide into {self.num_chunks} chunks, two for each rank")
        self.local_length, self.chunk_length = length // self.ranks, length // self.num_chunks
        self.chunk_ids = self.chunks_of(self.rank)
        self.chunks = tuple(self.chunk(index) for index in self.chunk_ids)
        self._visible_keys: dict[tuple[CPChunk, int | None], VisibleKeys] = {}
        self.halo_plans: dict[int, Any] = {}
        """halo.py's `HaloPlan` by width of the window, which all layers of a micro-batch share."""
        if document_ids is None:
            return
        if document_ids.shape != (batch, length):
            raise ValueError(f"document_ids must be of shape [{batch}, {length}], not {list(document_ids.shape)}")
        self._is_start = torch.ones_like(document_ids, dtype=torch.bool)
        self._is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        # On the host as well, because kernels take sizes from there: with ids on the device the only wait for it.
        self.document_starts: list[list[int]] = [[] for _ in range(batch)]
        for sample, position in self._is_start.nonzero().tolist():
            self.document_starts[sample].append(position)
        if not document_ids.is_cuda:
            self.document_ids, self._is_start = (to_device(x, device) for x in (document_ids, self._is_start))

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """Numbers of the chunks that a rank holds, in the order in which it holds them."""
        return (rank, self.num_chunks - 1 - rank) if self.ranks > 1 else (0,)

    def chunk(self, index: int) -> CPChunk:
        """Chunk `index` of the sequence."""
        return CPChunk(index * self.chunk_length, (index + 1) * self.chunk_length)

    def to_sequence_order(self, rank_major: Tensor) -> Tensor:
        """Chunks in the order of an all-gather (those of rank 0, those of rank 1, ...) -> a copy in sequence order.

        `rank_major` has as many rows of each chunk: [length, ...], [queries, ...] or [chunks, ...].
        """
        return self._reorder(rank_major, self._chunk_orders[0])

    def to_rank_major(self, x: Tensor) -> Tensor:
        """The inverse of `to_sequence_order`."""
        return self._reorder(x, self._chunk_orders[1])

    def _reorder(self, x: Tensor, chunks: Tensor) -> Tensor:
        return x.unflatten(0, (self.num_chunks, -1)).index_select(0, chunks).view_as(x)

    @cached_property
    def _chunk_orders(self) -> tuple[Tensor, Tensor]:
        """Places of the sequence's chunks in rank-major order, and the other way round."""
        places = rank_major_rows(torch.arange(self.num_chunks), self.num_chunks, self.ranks)
        return to_device(places, self.device), to_device(places.argsort(), self.device)

    def held_spans(self, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where ranks hold tokens first..stop-1: (row, offset, rows) for each chunk that has some of them.

        `row` counts in rank-major order, `offset` from `first`.
        """
        for index in range(self.num_chunks):
            chunk = self.chunk(index)
            begin, end = max(first, chunk.start), min(stop, chunk.stop)
            if begin < end:
                yield rank_major_rows(begin, self.length, self.ranks), begin - first, end - begin

    def fold(self, x_SB: Tensor) -> Tensor:
        """[s, b, ...] held here -> [chunks * b, chunk, ...], for layers that take chunks as samples."""
        return x_SB.unflatten(0, (len(self.chunks), -1)).transpose(1, 2).flatten(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        return x.unflatten(0, (len(self.chunks), -1)).transpose(1, 2).flatten(0, 1)

    @cached_property
    def folded_document_ids(self) -> Tensor | None:
        """Document ids of the tokens held here, [chunks * b, chunk]."""
        if self.document_ids is None:
            return None
        return torch.cat([self.document_ids[:, chunk.start : chunk.stop] for chunk in self.chunks])

    @cached_property
    def continues(self) -> Tensor | None:
        """Whether each chunk of the sequence begins inside a document of the chunk before, bool [chunks, b]."""
        if self.document_ids is None:
            return None
        return ~self._is_start[:, :: self.chunk_length].t()

    def local(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor whose dimension `dim` runs over the whole sequence."""
        parts = [x.narrow(dim, chunk.start, self.chunk_length) for chunk in self.chunks]
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]

    def positions(self) -> Tensor:
        """Positions of the tokens held here, counted in each document: int64 [s], with documents [s, b]."""
        return self.local(self.positions_in_documents(), 0)

    def positions_in_documents(self) -> Tensor:
        """Of the whole sequence: int64 [length], with documents [length, b]."""
        positions = torch.arange(self.length, device=self.device)
        if self.document_ids is None:
            return positions
        starts = torch.where(self._is_start, positions, 0).cummax(1).values
        return (positions - starts).t()

    def visible_keys(self, chunk: CPChunk, left_window: int | None) -> VisibleKeys:
        """What the queries of `chunk` attend to: themselves and `left_window` earlier keys, or all earlier if None.

        Documents are those of a window; `DocumentCalls` plans for attention to all earlier tokens of a document.
        """
        if (chunk, left_window) not in self._visible_keys:
            self._visible_keys[chunk, left_window] = self._find_visible_keys(chunk, left_window)
        return self._visible_keys[chunk, left_window]

    def _find_visible_keys(self, chunk: CPChunk, left_window: int | None) -> VisibleKeys:
        first = 0 if left_window is None else max(0, chunk.start - left_window)
        if self.document_ids is None:
            return VisibleKeys((first,) * self.batch, None)
        firsts, keys = [], [0]
        for starts in self.document_starts:
            firsts.append(max(first, starts[bisect_right(starts, chunk.start) - 1]))
            ends = [start for start in starts if chunk.start < start < chunk.stop] + [chunk.stop]
            offset = keys[-1] - firsts[-1]
            keys += [end + offset for end in ends]
        return VisibleKeys(tuple(firsts), packed_segments(keys, keys, self.device))


def packed_segments(queries: list[int], keys: list[int], device: torch.device | str) -> PackedSeqParams:
    """Segments of queries and keys, laid end to end; both sums are cumulative and start at 0, none is empty."""
    cu_seqlens_q, cu_seqlens_kv = (to_device(torch.tensor(sums, dtype=torch.int32), device) for sums in (queries, keys))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_q if keys == queries else cu_seqlens_kv,
        max_seqlen_q=max(stop - start for start, stop in pairwise(queries)),
        max_seqlen_kv=max(stop - start for start, stop in pairwise(keys)),
        pad_between_seqs=False,
    )
