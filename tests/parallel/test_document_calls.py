"""Few calls for queries in runs over packed documents: by hand, and beside attention with a mask, with gradients."""

import pytest
import torch
from megatron.core import parallel_state as mpu
from support.models import relative_error
from support.packed_attention import shard_of, with_calls, with_mask
from support.worlds import run_world

from yoco_megatron.ops.attention import packed_causal_attention
from yoco_megatron.parallel.context import document_calls
from yoco_megatron.parallel.context.document_calls import DocumentCalls
from yoco_megatron.parallel.context.query_shard import Runs, count
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

LENGTH, BATCH, HEADS, GROUPS, WIDTH = 64, 2, 4, 2, 8
TOLERANCE = 1e-12  # float64: sums in another order


def plan(shard: SequenceShard, runs: Runs, monkeypatch, tile: int = 1, long: int = 4096) -> DocumentCalls:
    monkeypatch.setattr(document_calls, "QUERY_TILE", tile)
    monkeypatch.setattr(document_calls, "LONG_DOCUMENT", long)
    return DocumentCalls(shard, runs)


def segments(calls: DocumentCalls) -> list[tuple[list[int], list[int]]]:
    """cu_seqlens of each call."""
    return [(call.packed.cu_seqlens_q.tolist(), call.packed.cu_seqlens_kv.tolist()) for call in calls.calls]


def laid_out(calls: DocumentCalls) -> list[list[int]]:
    """Positions whose keys are laid out."""
    kv = torch.arange(calls.shard.length * calls.shard.batch).view(calls.shard.length, calls.shard.batch)
    return [keys.flatten().tolist() for keys in calls.lay_out(kv)]


def test_an_answer_at_each_documents_end(monkeypatch) -> None:
    """Everything is where it is needed already; one run crosses into the next document and is cut there."""
    calls = plan(shard_of([10, 6]), ((7, 12), (14, 16)), monkeypatch, tile=3)
    assert segments(calls) == [([0, 3, 9], [0, 10, 16])]
    assert calls.in_place == [True]
    assert calls.query_rows.tolist() == [0, 1, 2, 3, 4, 4, 4, 5, 6]  # positions 12 and 13 are in a gap
    assert calls.query_places.tolist() == [0, 1, 2, 3, 4, 7, 8]


def test_an_answer_a_document(monkeypatch) -> None:
    """The end of the first document and all of the second are of no use."""
    calls = plan(shard_of([6, 4, 6]), ((2, 4), (12, 15)), monkeypatch)
    assert segments(calls) == [([0, 2, 5], [0, 4, 9])]
    assert laid_out(calls) == [[0, 1, 2, 3, 10, 11, 12, 13, 14]]
    assert calls.query_rows is None


def test_two_answers_a_document_are_still_one_call(monkeypatch) -> None:
    calls = plan(shard_of([8, 8]), ((2, 3), (6, 8), (9, 10), (14, 15)), monkeypatch)
    assert segments(calls) == [([0, 1, 3, 4, 5], [0, 3, 11, 13, 20])]
    assert laid_out(calls) == [[0, 1, 2, *range(8), 8, 9, *range(8, 15)]]
    assert calls.query_rows is None


def test_the_gradient_returns_in_an_order_of_its_own(monkeypatch) -> None:
    """Position 0 is in three segments: each addition has it once, whatever the order of atomics."""
    calls = plan(shard_of([8]), ((1, 2), (4, 5), (7, 8)), monkeypatch)
    (keys,) = calls._key_rows
    assert [rows.tolist() for rows, _ in keys.additions] == [[*range(8)], [*range(5)], [0, 1]]
    gradient = torch.ones(15, 1, 1)
    assert calls.put_back([gradient]).flatten().tolist() == [3, 3, 2, 2, 2, 1, 1, 1]


def test_a_gap_of_a_tile_is_left_out(monkeypatch) -> None:
    runs = ((1, 2), (5, 6))
    assert segments(plan(shard_of([8]), runs, monkeypatch, tile=3)) == [([0, 1, 2], [0, 2, 8])]
    assert segments(plan(shard_of([8]), runs, monkeypatch, tile=4)) == [([0, 5], [0, 6])]


def test_a_long_document_is_laid_out_once(monkeypatch) -> None:
    calls = plan(shard_of([3, 9]), ((1, 3), (5, 6), (10, 12)), monkeypatch, long=5)
    assert segments(calls) == [([0, 2], [0, 3]), ([0, 1], [0, 3]), ([0, 2], [0, 9])]
    assert laid_out(calls) == [[*range(3, 12)]]
    assert [(call.laid_out, call.num_keys) for call in calls.calls] == [(0, 3), (1, 3), (1, 9)]
    assert calls.in_place == [True, False]


def test_samples_of_a_batch(monkeypatch) -> None:
    """The rows of two samples alternate."""
    calls = plan(shard_of([4, 4], [8]), ((2, 3), (5, 6)), monkeypatch, tile=9)
    assert segments(calls) == [([0, 1, 2, 6], [0, 3, 5, 11])]
    assert laid_out(calls) == [[0, 2, 4, 8, 10, 1, 3, 5, 7, 9, 11]]
    assert calls.query_rows.tolist() == [0, 2, 1, 1, 1, 3]


def test_all_positions_are_read_where_they_are(monkeypatch) -> None:
    calls = plan(shard_of([4, 5]), ((0, 9),), monkeypatch)
    assert segments(calls) == [([0, 4, 9], [0, 4, 9])]
    assert calls.in_place == [True] and calls.query_rows is None


def random_runs(multiple: int) -> Runs:
    """At random positions, whose number is a multiple."""
    chosen = torch.rand(LENGTH) < 0.35
    while chosen.sum() % multiple or not chosen.any():
        chosen[torch.randint(LENGTH, ())] = True
    edges = torch.nn.functional.pad(chosen.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return tuple(zip(edges[::2], edges[1::2]))


def errors_on_this_rank(seed: int, tile: int, long: int) -> list[float]:
    """Relative errors of two layers' outputs and of the gradients; random runs, documents and inputs."""
    document_calls.QUERY_TILE, document_calls.LONG_DOCUMENT = tile, long
    torch.manual_seed(seed)
    group = mpu.get_context_parallel_group()
    cuts = [torch.randperm(LENGTH - 1)[:5].sort().values + 1 for _ in range(BATCH)]
    packs = [torch.tensor([0, *cut, LENGTH]).diff().tolist() for cut in cuts]
    shard = shard_of(*packs, group=group if group.size() > 1 else None)
    runs = random_runs(2 * group.size())
    kv = torch.randn(LENGTH, BATCH, GROUPS, 2, WIDTH, dtype=torch.float64)
    query, gradient = torch.randn(2, 2, count(runs), BATCH, HEADS, WIDTH, dtype=torch.float64)
    layers = list(zip(query, gradient.flatten(3)))

    def core(query, key, value, attention_mask, mask_type, packed_seq_params):
        packed = packed_seq_params
        sums = packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv
        assert sums[0].diff().min() > 0 and sums[1][-1] == len(key) == len(value)
        return packed_causal_attention(query, key, value, *sums).flatten(1)

    found, wanted = with_calls(core, shard, runs, kv, layers), with_mask(shard, runs, kv, layers)
    assert found.keys() == wanted.keys()
    return [relative_error(found[name], wanted[name]) for name in found]


@pytest.mark.parametrize(("tile", "long"), [(1, 4096), (6, 4096), (1, 0), (3, 20), (128, 4096)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_equals_attention_with_a_mask(ranks: int, tile: int, long: int) -> None:
    """Segments apart, joined, each a call, both, and a document one segment."""
    for errors in run_world(ranks, errors_on_this_rank, 7 * tile + long, tile, long, cp=ranks):
        assert max(errors) < TOLERANCE, errors
