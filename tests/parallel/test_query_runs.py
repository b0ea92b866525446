"""Which positions are computed behind the shared K,V, from where samples have a loss."""

from itertools import pairwise

import numpy as np
import pytest

from yoco_megatron.parallel.context.query_runs import SIZES, SMALL_GAP, SMALLEST_SIZE, num_visible_keys, runs_of
from yoco_megatron.parallel.context.query_shard import count

LENGTH = 8192  # of which a size is 256


def mask(*runs: tuple[int, int], length: int = LENGTH) -> np.ndarray:
    has_loss = np.zeros(length, bool)
    for start, stop in runs:
        has_loss[start:stop] = True
    return has_loss


@pytest.mark.parametrize(
    ("has_loss", "runs"),
    [
        # A gap that is too small to leave out; then the runs grow to the next size, the smallest gap first.
        (mask((1000, 1100), (1163, 1200)), ((944, 1200),)),
        (mask((1000, 1100), (1200, 1300), (3000, 3057)), ((845, 1300), (3000, 3057))),
        (mask((0, 256)), ((0, 256),)),
        (mask((0, 10), (8182, 8192)), ((0, 10), (7946, 8192))),
        (mask((8, 8192 - 520)), ((0, 7680),)),
        # Before the first run and behind the last one a small gap is left out.
        (mask((10, 138), (8000, 8128)), ((10, 138), (8000, 8128))),
        (mask(), ((8191, 8192),)),
        # Less than a sixteenth would be left out.
        (mask((0, 7681)), None),
        (mask((0, 8192)), None),
        (mask((0, 4000), (4063, 8192)), None),
    ],
)
def test_runs(has_loss, runs):
    assert runs_of(has_loss) == runs


def test_without_a_loss_as_few_rows_as_ranks_can_share():
    assert runs_of(mask(), 12) == ((8180, 8192),)


@pytest.mark.parametrize("multiple", [1, 12, 96])
@pytest.mark.parametrize("length", [1000, 8192, 50_000])
def test_any_positions(length: int, multiple: int):
    """Every position with a loss is computed, in runs that are worth it, in one of a few numbers of rows."""
    random, sizes, kept = np.random.default_rng(length + multiple), set(), 0
    length -= length % multiple
    for _ in range(300):
        starts = random.integers(0, length, random.integers(1, 60))
        has_loss = mask(*((at, at + random.integers(1, length // 40)) for at in starts), length=length)
        runs = runs_of(has_loss, multiple)
        if runs is None:
            continue
        kept += 1
        assert not (has_loss & ~mask(*runs, length=length)).any()
        assert all(0 <= start < stop <= length for start, stop in runs)
        gaps = [start - stop for (_, stop), (start, _) in pairwise(runs)]
        assert min(gaps, default=SMALL_GAP) > 0
        assert count(runs) % multiple == 0
        sizes.add(count(runs))
        filled = count(runs) - has_loss.sum()
        assert filled < max(SMALLEST_SIZE, length // SIZES) + multiple + SMALL_GAP * len(starts)
    assert kept > 50 and len(sizes) <= SIZES


def test_keys_that_queries_see():
    """Those of their document, up to themselves; the data loader pads the documents' ends."""
    runs, starts = ((2, 5), (9, 12), (14, 16)), np.array([0, 4, 10, 16, 16, 16], np.int32)
    assert num_visible_keys(runs, starts) == (3 + 4 + 1) + (6 + 1 + 2) + (5 + 6)
    assert num_visible_keys(runs, starts[:1]) == (3 + 4 + 5) + (10 + 11 + 12) + (15 + 16)
