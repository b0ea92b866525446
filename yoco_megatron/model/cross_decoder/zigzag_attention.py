"""Causal attention of a rank's two zig-zag chunks without a masked rectangle.

Queries of chunk c attend to the keys before it and, causally, to its own. One call for each chunk would put a causal
mask into the lower right corner of a rectangle. Instead, with rank r's chunks r and N - 1 - r, masked calls are square:

    own      both chunks' queries, both chunks' keys: one causal square, in which the second chunk attends to all of the
             first
    early    both chunks' queries, keys of chunks 0 .. r - 1: no mask
    middle   the second chunk's queries, keys of chunks r + 1 .. N - 2 - r: no mask

In units of chunk_length^2 they cost 2, 2r and N - 2 - 2r: as much on every rank. The parts are merged by their
log-sum-exp.
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor

from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedKVReader
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.attention import partial
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


@dataclass(frozen=True)
class _Part:
    """Queries from row `first_query` on, over the next keys and values."""

    first_query: int
    causal: bool


def is_supported(config: YOCOConfig, query: Tensor, shard: SequenceShard) -> bool:
    """True if `zigzag_attention` can compute attention of query [s, b, H, D] and do all that the config asks for."""
    asks_for_more = (
        config.deterministic_mode
        or config.attention_dropout > 0
        or config.fp8_dot_product_attention
        or config.attention_backend not in (AttnBackend.auto, AttnBackend.fused)
    )
    if asks_for_more or shard.ranks == 1 or shard.document_ids is not None:
        return False
    return partial.is_supported(query.permute(1, 2, 0, 3), shard.chunk_length)


def zigzag_attention(query: Tensor, kv_reader: SharedKVReader, shard: SequenceShard, scale: float) -> Tensor:
    """query [s, b, H, D] of this rank over the shared K,V of the whole sequence -> [s, b, H * D]."""
    first, second = shard.chunks
    parts, keys_and_values = [_Part(0, True)], [*kv_reader.read_own()]
    if first.start > 0:
        parts.append(_Part(0, False))
        keys_and_values += kv_reader.read(0, first.start)
    if first.stop < second.start:
        parts.append(_Part(shard.chunk_length, False))
        keys_and_values += kv_reader.read(first.stop, second.start)
    return _MergedAttention.apply(query, scale, parts, *keys_and_values).flatten(2)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[s, b, heads, D] -> [b, heads, s, D], views."""
    return [x.permute(1, 2, 0, 3) for x in tensors]


def _sequence_first(*tensors: Tensor) -> list[Tensor]:
    """The inverse of `_heads_first`."""
    return [x.permute(2, 0, 1, 3) for x in tensors]


class _MergedAttention(torch.autograd.Function):
    """Parts of one softmax, merged. The first part has all queries."""

    @staticmethod
    def forward(ctx, query, scale, parts, *keys_and_values):
        q, *kv = _heads_first(query, *keys_and_values)
        ctx.scale, ctx.parts, ctx.rng_states = scale, parts, []
        for index, part in enumerate(parts):
            k, v = kv[2 * index : 2 * index + 2]
            part_o, part_lse, rng_state = partial.forward(q[:, :, part.first_query :], k, v, part.causal, scale)
            ctx.rng_states.append(rng_state)
            if index == 0:
                o, lse = part_o, part_lse
            else:
                partial.merge_(o[:, :, part.first_query :], lse[..., part.first_query :], part_o, part_lse)
        ctx.save_for_backward(query, o, lse, *keys_and_values)
        return o.permute(2, 0, 1, 3).contiguous()

    @staticmethod
    def backward(ctx, do):
        query, o, lse, *keys_and_values = ctx.saved_tensors
        q, do, *kv = _heads_first(query, do.contiguous(), *keys_and_values)
        gradients = []
        for index, (part, rng_state) in enumerate(zip(ctx.parts, ctx.rng_states)):
            at = part.first_query
            k, v = kv[2 * index : 2 * index + 2]
            do_part, q_part, o_part, lse_part = do[:, :, at:], q[:, :, at:], o[:, :, at:], lse[..., at:]
            dq_part, dk, dv = partial.backward(
                do_part, q_part, k, v, o_part, lse_part, rng_state, part.causal, ctx.scale
            )
            gradients += _sequence_first(dk, dv)
            if index == 0:
                dq = dq_part
            else:
                dq[:, :, at:].add_(dq_part)
        return *_sequence_first(dq), None, None, *gradients
