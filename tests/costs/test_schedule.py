"""The pipeline's schedule, against the known figures of equal stages and against bounds of unequal ones."""

import random
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from yoco_megatron.costs.schedule import _order, about_waiting_seconds, pipeline_seconds, waiting_seconds


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), [(2, 1, 1), (4, 1, 8), (4, 1, 3), (4, 2, 8), (3, 5, 12)])
def test_equal_stages_have_the_known_bubble(ranks, chunks, microbatches):
    """(P - 1) / V micro-batches of a rank (Narayanan et al. 2021); waiting for others alike, whatever the forward's
    share."""
    stages = [1.0 / chunks] * (ranks * chunks)
    for forward in (1 / 3, 1 / 4):
        waited = waiting_seconds(stages, ranks, microbatches, forward)
        assert waited == pytest.approx((ranks - 1) / chunks)
    assert about_waiting_seconds(stages, ranks, microbatches, forward) == pytest.approx((ranks - 1) / chunks)


@pytest.mark.parametrize("chunks", [1, 3])
def test_unequal_stages_take_at_least_their_bounds(chunks):
    """The busiest rank's work, and one micro-batch through all stages; at most everything one after another."""
    ranks, microbatches = 4, 8
    stages = [random.uniform(0.5, 2.0) for _ in range(ranks * chunks)]
    total = pipeline_seconds(stages, ranks, microbatches, 1 / 3)
    busiest = max(sum(stages[rank::ranks]) for rank in range(ranks))
    assert max(microbatches * busiest, sum(stages)) <= total <= microbatches * sum(stages)
    assert waiting_seconds(stages, ranks, microbatches, 1 / 3) == pytest.approx(total - microbatches * busiest)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_long_step_is_followed_in_part(chunks):
    """Each further group of micro-batches takes as long as the one before: within a thousandth of the whole."""
    stages = [random.uniform(0.5, 2.0) for _ in range(4 * chunks)]
    whole = pipeline_seconds(stages, 4, 120, 1 / 3)
    busiest = max(sum(stages[rank::4]) for rank in range(4))
    assert waiting_seconds(stages, 4, 120, 1 / 3) + 120 * busiest == pytest.approx(whole, rel=1e-3)


def test_no_rank_waits_less_than_nothing():
    """A sixth group that makes up for the fifth's waiting; a hundred more like it would end before the work does."""
    stages = [1.4, 1.1, 1.2, 1.4]
    waited = pipeline_seconds(stages, 2, 64, 1 / 3) - 64 * 2.6
    assert waiting_seconds(stages, 2, 64, 1 / 3) == pytest.approx(waited, abs=0.2)
    assert waiting_seconds(stages, 2, 640, 1 / 3) > 0


def test_chunks_of_different_lengths_wait_for_each_other():
    """Two ranks with as much work each: none waits in equal chunks; in chunks of turned lengths both do."""
    equal = waiting_seconds([1.0, 1.0, 1.0, 1.0], 2, 8, 1 / 3)
    turned = waiting_seconds([1.5, 0.5, 0.5, 1.5], 2, 8, 1 / 3)
    assert equal == pytest.approx(1.0) and turned > 2.0


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), [(4, 1, 8), (4, 1, 2), (4, 3, 8), (2, 2, 2)])
def test_passes_come_in_megatrons_order(ranks, chunks, microbatches):
    """How many warm up, and which chunk and micro-batch each forward pass is of, by Megatron's own functions."""
    for rank in range(ranks):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        virtual = chunks if chunks > 1 else None
        communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        _, _, warm_up, _ = get_pp_rank_microbatches(microbatches, chunks, ranks, p2p_communicator=communicator)
        order = _order(rank, ranks, chunks, microbatches)
        first_backward = next(at for at, (forward, *_) in enumerate(order) if not forward)
        assert first_backward == min(warm_up + 1, microbatches * chunks)
        forwards = [(batch, chunk) for forward, chunk, batch in order if forward]
        assert forwards == get_schedule_table(microbatches, chunks, ranks)
        backwards = [(batch, chunks - 1 - chunk) for forward, chunk, batch in order if not forward]
        assert backwards == forwards
