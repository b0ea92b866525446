"""Attention of queries over the keys of each context-parallel rank, merged, by one process; and what it must be."""

from types import SimpleNamespace

import torch

from yoco_megatron.model.cross_decoder import attention_in_parts
from yoco_megatron.model.cross_decoder.travelling_queries import _merge, parts_over_own_keys
from yoco_megatron.ops.attention.reference import causal_attention
from yoco_megatron.parallel.context.query_shard import Runs, positions_of
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


def shard_of(rank: int, ranks: int, length: int, batch: int) -> SequenceShard:
    """Of a rank whose process there is not."""
    group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    return SequenceShard(length, batch, group=group)


def travelling_and_causal(
    runs: Runs, ranks: int, length: int, like: torch.Tensor, heads: int = 4, groups: int = 2, width: int = 8
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """o, dq, dk and dv of random q, k, v in the dtype and on the device of `like`: as found, and in float64."""
    batch, scale = 2, width**-0.5

    def random(heads: int) -> torch.Tensor:
        return torch.randn(batch, length, heads, width, dtype=like.dtype, device=like.device).transpose(1, 2)

    rows = positions_of(runs, like.device)
    all_q, k, v = random(heads), random(groups), random(groups)
    whole = [x.double().requires_grad_() for x in (all_q, k, v)]
    reference = causal_attention(*whole)[:, :, rows]
    do = random(heads)[:, :, : len(rows)]
    wanted = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(reference, whole, do.double())))
    wanted |= {"o": reference.detach(), "dq": wanted["dq"][:, :, rows]}

    q, held = all_q[:, :, rows], []
    for rank in range(ranks):
        shard = shard_of(rank, ranks, length, batch)
        parts, spans = parts_over_own_keys(shard, runs)
        own = [shard.local(x, 2) for x in (k, v)]
        kv = [x[:, :, first:stop] for first, stop in spans for x in own]
        held.append((shard, parts, spans, kv, attention_in_parts.forward(q, kv, parts, scale)))
    outputs, lses, _ = zip(*(of_rank[-1] for of_rank in held))
    o, lse = _merge(torch.stack(outputs), torch.stack(lses)[..., None])

    found = {"o": o, "dq": torch.zeros_like(q, dtype=lse.dtype)}
    found |= {name: torch.zeros_like(x, dtype=lse.dtype) for name, x in (("dk", k), ("dv", v))}
    for shard, parts, spans, kv, (_, _, rng_states) in held:
        dq, gradients = attention_in_parts.backward(do, q, kv, o, lse[..., 0], parts, rng_states, scale)
        found["dq"] += dq
        positions = shard.positions()
        for index, name in enumerate(("dk", "dv")):
            for (first, stop), gradient in zip(spans, gradients[index::2]):
                at = positions[first:stop].to(like.device)
                found[name][:, :, at] += gradient
    return {name: (found[name], wanted[name]) for name in wanted}
