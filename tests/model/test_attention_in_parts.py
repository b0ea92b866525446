"""Attention of queries over the keys of each context-parallel rank, merged, is causal attention over all keys."""

import pytest
import torch

from yoco_megatron.model.cross_decoder import attention_in_parts
from yoco_megatron.model.cross_decoder.travelling_queries import _merge, parts_over_own_keys
from yoco_megatron.ops.attention.reference import causal_attention
from yoco_megatron.parallel.context.query_shard import Runs, positions_of
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

LENGTH, BATCH, HEADS, GROUPS, WIDTH = 48, 2, 4, 2, 8
RUNS = {
    "a suffix in one chunk": ((43, 48),),
    "a suffix across borders": ((29, 48),),
    "all": ((0, 48),),
    "the beginning": ((0, 3),),
    "runs in a chunk, across borders, and a chunk": ((1, 2), (4, 9), (11, 14), (18, 24), (40, 41)),
}


class Group:
    """Of rank `of` among `ranks`, for one process."""

    def __init__(self, ranks: int, of: int) -> None:
        self.size, self.rank = lambda: ranks, lambda: of


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_equals_causal_attention(runs: Runs, ranks: int) -> None:
    def random(heads: int, rows: int) -> torch.Tensor:
        return torch.randn(BATCH, heads, rows, WIDTH, dtype=torch.float64)

    rows = positions_of(runs)
    all_q, k, v = random(HEADS, LENGTH), random(GROUPS, LENGTH), random(GROUPS, LENGTH)
    whole = [x.requires_grad_() for x in (all_q, k, v)]
    reference = causal_attention(*whole)[:, :, rows]
    do = torch.randn_like(reference)
    dq, dk, dv = torch.autograd.grad(reference, whole, do)

    q, scale, found = all_q.detach()[:, :, rows], WIDTH**-0.5, []
    for rank in range(ranks):
        shard = SequenceShard(LENGTH, BATCH, group=Group(ranks, rank))
        parts, spans = parts_over_own_keys(shard, runs)
        own = [shard.local(x.detach(), 2) for x in (k, v)]
        kv = [x[:, :, first:stop] for first, stop in spans for x in own]
        found.append((shard, parts, spans, kv, *attention_in_parts.forward(q, kv, parts, scale)))
    o, lse = _merge(torch.stack([one[4] for one in found]), torch.stack([one[5] for one in found])[..., None])
    torch.testing.assert_close(o, reference.detach())

    total_dq = torch.zeros_like(q)
    for shard, parts, spans, kv, _, _, rng_states in found:
        part_dq, gradients = attention_in_parts.backward(do, q, kv, o, lse[..., 0], parts, rng_states, scale)
        total_dq += part_dq
        for index, wanted in enumerate((dk, dv)):
            own = torch.zeros(BATCH, GROUPS, shard.local_length, WIDTH, dtype=torch.float64)
            for (first, stop), gradient in zip(spans, gradients[index::2]):
                own[:, :, first:stop] += gradient
            torch.testing.assert_close(own, shard.local(wanted, 2))
    torch.testing.assert_close(total_dq, dq[:, :, rows])


def test_a_suffix_is_as_much_work_on_each_rank() -> None:
    """In products of queries and keys, half of a causal square's."""
    work = []
    for rank in range(4):
        parts, spans = parts_over_own_keys(SequenceShard(4096, 1, group=Group(4, rank)), ((3968, 4096),))
        products = [(part.stop - part.first) * (stop - first) for part, (first, stop) in zip(parts, spans)]
        work.append(sum(n / 2 if part.causal else n for part, n in zip(parts, products)))
        assert len(parts) == (2 if rank == 0 else 1)
    assert work == [128 * (1024 - 64), *[128 * 1024] * 3]
