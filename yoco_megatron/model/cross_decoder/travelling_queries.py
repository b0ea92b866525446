"""Cross attention of few queries under context parallelism: the queries travel, keys and values stay where they are.

Every rank gets the queries of all ranks and attends to the keys that it holds, two zig-zag chunks, so that every rank
has as much to do for queries at a sequence's end. What it found goes back to the ranks of the queries, and is merged
there by log-sum-exp. No rank holds the K,V of the whole sequence, nor their gradient.

In backward the ranks get all queries again, with their merged outputs and the gradients of these: gathered queries are
not stored. Gradients of K,V stay, too; those of the queries go back and are summed.

Rounding: a rank's output for a query, and the query's gradient, go back in the queries' dtype; they are merged and
summed in fp32 or wider, with one rounding.
"""

from itertools import pairwise
from math import gcd
from typing import Any

import torch
from torch import Tensor

from yoco_megatron.costs.traffic import cross_attention_bytes, queries_are_less, recomputes_cross_attention
from yoco_megatron.model.cross_decoder import attention_in_parts
from yoco_megatron.model.cross_decoder.attention_in_parts import Part, heads_first, sequence_first
from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedKVReader
from yoco_megatron.parallel.context.query_exchange import gather_queries, return_to_ranks
from yoco_megatron.parallel.context.query_shard import QueryShard, Runs, count
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.utils.errors import require


def queries_travel(config: Any, ranks: int, length: int, runs: Runs, device: torch.device) -> bool:
    """True if queries of whole sequences travel between context-parallel ranks, False if all keys and values do.

    Of fewer bytes, unless --cp-cross-attention says; the same on all ranks and stages.

    Args:
        config: a YOCOConfig, or the resolved arguments of a run.
        runs: all queries of a sequence of `length`.
    Raises:
        ValueError: they should, and there is no kernel for it.
    """
    if ranks == 1 or config.cp_cross_attention == "keys":
        return False
    multiple = gcd(length // (2 * ranks), *(edge for run in runs for edge in run))
    supported = attention_in_parts.is_supported(config, device, multiple)
    if config.cp_cross_attention == "queries":
        require(
            supported,
            "--cp-cross-attention queries needs Hopper or newer, 16-bit numbers, heads of at most 128 in steps of 8, "
            "and, in multiples of 128, chunks of the sequence and runs of positions with a loss "
            f"(here {multiple}): use auto",
        )
        return True
    return supported and queries_are_less(received_by_cross_attention(config, ranks, length, runs))


def received_by_cross_attention(config: Any, ranks: int, length: int, runs: Runs) -> dict[str, float]:
    """Bytes by way, in 16 bits: `cross_attention_bytes`, of all tensor-parallel ranks, for one sequence."""
    return cross_attention_bytes(
        config,
        ranks,
        length,
        count(runs),
        kv_reads=StagePlan.from_config(config).kv_reads,
        forward_passes=2 if recomputes_cross_attention(config) else 1,
    )


class TravellingQueries:
    """The queries of a micro-batch, which attend to the keys of each rank there; layers get it as a `QueryShard`."""

    def __init__(self, queries: QueryShard) -> None:
        self.shard = queries.whole
        self.parts, self.spans = parts_over_own_keys(queries.whole, queries.all_runs)

    def attention(self, query: Tensor, kv_reader: SharedKVReader, scale: float) -> Tensor:
        """query [m/C, b, H, D] of this rank over the shared K,V of the whole sequence -> [m/C, b, H * D].

        `kv_reader` reads this rank's keys and values.
        """
        keys_and_values = [x for span in self.spans for x in kv_reader.read(*span)]
        return _TravellingAttention.apply(query, scale, self.parts, self.shard, *keys_and_values).flatten(2)


def parts_over_own_keys(shard: SequenceShard, runs: Runs) -> tuple[list[Part], list[tuple[int, int]]]:
    """Attention of all queries over the keys that this rank holds: parts, and the rows [first, stop) of their keys.

    Keys lie in the order of their positions, so a query attends to the first few of them. Each row of keys is in at
    most one part without a mask, with all queries behind it, and in one causal square, with the queries at its tokens.
    """
    total, parts, spans = count(runs), [], []
    query = covered = 0
    for start, stop in runs:
        edges = {edge for chunk in shard.chunks for edge in (chunk.start, chunk.stop) if start < edge < stop}
        for first, last in pairwise(sorted({start, stop} | edges)):
            keys = sum(min(max(first - chunk.start, 0), shard.chunk_length) for chunk in shard.chunks)
            if keys > covered:
                parts.append(Part(query, total, False))
                spans.append((covered, keys))
                covered = keys
            if any(chunk.start <= first < chunk.stop for chunk in shard.chunks):
                parts.append(Part(query, query + last - first, True))
                spans.append((keys, keys + last - first))
            query += last - first
    # Where no query is behind any key: they are read all the same, for their gradient, zero.
    return (parts, spans) if parts else ([Part(total, total, False)], [(0, shard.local_length)])


class _TravellingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, scale, parts, shard, *keys_and_values):
        (q,) = heads_first(*gather_queries(shard, query))
        part_o, part_lse, ctx.rng_states = attention_in_parts.forward(q, heads_first(*keys_and_values), parts, scale)
        (part_o,) = sequence_first(part_o)
        o, lse = _merge(*return_to_ranks(shard, part_o, part_lse.permute(2, 0, 1)[..., None]))
        ctx.scale, ctx.parts, ctx.shard = scale, parts, shard
        ctx.save_for_backward(query, o, lse, *keys_and_values)
        return o

    @staticmethod
    def backward(ctx, do):
        query, o, lse, *keys_and_values = ctx.saved_tensors
        q, o, do, lse = heads_first(*gather_queries(ctx.shard, query, o, do, lse))
        part_dq, gradients = attention_in_parts.backward(
            do, q, heads_first(*keys_and_values), o, lse.squeeze(-1), ctx.parts, ctx.rng_states, ctx.scale
        )
        (dq,) = return_to_ranks(ctx.shard, *sequence_first(part_dq))
        dq = dq.sum(0, dtype=lse.dtype).to(query.dtype)
        return dq, None, None, None, *sequence_first(*gradients)


def _merge(part_o: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of all ranks for the same queries, [C, m, b, H, D] and [C, m, b, H, 1] -> merged, [m, b, H, *]."""
    lse = part_lse.logsumexp(0)
    weights = (part_lse - lse).exp()
    return (weights * part_o).sum(0).to(part_o.dtype), lse
