"""The positions of a micro-batch that are computed behind the shared K,V, from where its samples have a loss."""

import numpy as np
from numpy.typing import NDArray

from yoco_megatron.parallel.context.query_shard import Runs, suffix_run

SMALL_GAP = 64
"""Positions between two runs that are computed as well: each run is a part of attention of its own, which a GPU fills
with whole tiles of queries, so that it saves nothing to leave out fewer."""

SIZES = 32
"""Numbers of queries that a sequence can have, because cuDNN and compiled kernels prepare anew for each."""
SMALLEST_SIZE = 128

WORTH = 1 / 16
"""Share of the positions that must be spared, or all are computed: that is one shape, and nothing is gathered."""


def runs_of(has_loss: NDArray[np.bool_], multiple: int = 1) -> Runs | None:
    """Runs that hold every position with a loss; None for all positions, where too few would be spared.

    Args:
        has_loss: bool [length], the union of a micro-batch's samples.
        multiple: `queries_multiple`.
    Returns:
        as few runs as rounding up to one of `SIZES` numbers of queries allows. Without any loss the last `multiple`
        positions: a step needs a graph.
    """
    length = len(has_loss)
    edges = np.flatnonzero(np.diff(has_loss, prepend=False, append=False))
    if not len(edges):
        return suffix_run(1, length, multiple)
    starts, stops = edges[::2].copy(), edges[1::2].copy()
    gaps = np.diff(edges, prepend=0, append=length)[::2]  # before each run, and behind the last
    filled = np.where(gaps < SMALL_GAP, gaps, 0)
    filled[[0, -1]] = 0  # no gap between runs
    size = -(-max(SMALLEST_SIZE, length // SIZES) // multiple) * multiple
    queries = length - gaps.sum() + filled.sum()
    rounded = -(-queries // size) * size
    if rounded > length * (1 - WORTH):
        return None
    # The smallest gaps first: each one that closes is one run less.
    order = np.argsort(gaps, kind="stable")
    left = (gaps - filled)[order]
    filled[order] += np.clip(rounded - queries - (np.cumsum(left) - left), 0, left)
    starts -= filled[:-1]
    stops[-1] += filled[-1]
    apart = starts[1:] > stops[:-1]
    return tuple(zip(starts[np.r_[True, apart]].tolist(), stops[np.r_[apart, True]].tolist()))


def num_visible_keys(runs: Runs, starts: NDArray[np.integer]) -> int:
    """Keys that all queries of one sequence attend to: each those of its document up to itself.

    Args:
        starts: the first positions of the documents, ascending from 0.
    """
    before = np.r_[0, np.cumsum(_triangle(np.diff(starts)))]

    def up_to(positions: NDArray[np.integer]) -> NDArray[np.integer]:
        document = np.searchsorted(starts, positions, "right") - 1
        return before[document] + _triangle(positions - starts[document])

    edges = np.array(runs, dtype=np.int64)
    return int((up_to(edges[:, 1]) - up_to(edges[:, 0])).sum())


def _triangle(n: NDArray[np.integer]) -> NDArray[np.integer]:
    return n * (n + 1) // 2
