"""Attention of queries over the keys of each context-parallel rank, merged, is causal attention over all keys."""

import pytest
import torch
from support.attention_parts import shard_of, travelling_and_causal
from support.models import FULL_RECOMPUTE, STORED_ATTENTION, tiny_config

from yoco_megatron.model.cross_decoder.travelling_queries import parts_over_own_keys, queries_travel
from yoco_megatron.parallel.context.query_shard import Runs

LENGTH = 48
RUNS = {
    "a suffix in one chunk": ((43, 48),),
    "a suffix across borders": ((29, 48),),
    "all": ((0, 48),),
    "the beginning": ((0, 3),),
    "runs in a chunk, across borders, and a chunk": ((1, 2), (4, 9), (11, 14), (18, 24), (40, 41)),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_equals_causal_attention(runs: Runs, ranks: int) -> None:
    for found, wanted in travelling_and_causal(runs, ranks, LENGTH, torch.empty(0, dtype=torch.float64)).values():
        torch.testing.assert_close(found, wanted)


def test_a_suffix_is_as_much_work_on_each_rank() -> None:
    """In products of queries and keys, half of a causal square's."""
    work = []
    for rank in range(4):
        parts, spans = parts_over_own_keys(shard_of(rank, 4, 4096, 1), ((3968, 4096),))
        products = [(part.stop - part.first) * (stop - first) for part, (first, stop) in zip(parts, spans)]
        work.append(sum(n / 2 if part.causal else n for part, n in zip(parts, products)))
        assert len(parts) == (2 if rank == 0 else 1)
    assert work == [128 * (1024 - 64), *[128 * 1024] * 3]


# Queries of as many bytes as the keys of 4096 tokens. Keys: once 2 x 4 heads of 8, K,V in 2 bytes and gradients in 4.
# Queries: 8 heads in two layers, six tensors in 2 bytes and two log-sum-exps in 4.
EVEN = 4096 * 2 * 4 * 8 * (2 + 4) // (2 * 8 * (6 * 8 * 2 + 2 * 4))


@pytest.mark.parametrize(
    ("options", "queries", "travel"),
    [
        ({}, EVEN - 1, True),
        ({}, EVEN + 1, False),
        (FULL_RECOMPUTE, EVEN - 1, False),
        (STORED_ATTENTION, EVEN - 1, True),
        (dict(deterministic_mode=True), 8, False),
        (dict(cp_cross_attention="keys"), 8, False),
        (dict(cp_cross_attention="queries"), 4096, True),
    ],
)
def test_what_is_fewer_bytes_travels(options: dict, queries: int, travel: bool) -> None:
    assert queries_travel(tiny_config(**options), 4, 4096, ((4096 - queries, 4096),), torch.device("cpu")) == travel


def test_queries_that_cannot_travel() -> None:
    config = tiny_config(cp_cross_attention="queries", deterministic_mode=True)
    assert not queries_travel(config, 1, 4096, ((4000, 4096),), torch.device("cpu"))
    with pytest.raises(ValueError, match="--cp-cross-attention queries needs"):
        queries_travel(config, 4, 4096, ((4000, 4096),), torch.device("cpu"))
