"""Causal attention of a rank's two chunks without a masked rectangle.

Queries of chunk c see the keys before it and, causally, its own. One call for each chunk would put a causal mask into
the lower right corner of a rectangle. Instead, with rank r's chunks r and N - 1 - r, masked calls are square:

    own      both chunks' queries, both chunks' keys: one causal square, whose second chunk sees the whole first one
    early    both chunks' queries, keys of chunks 0 .. r - 1: no mask
    middle   the second chunk's queries, keys of chunks r + 1 .. N - 2 - r: no mask

In squares of a chunk these are 2, 2 r and N - 2 - 2 r: as much on every rank.
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


def fits(config: YOCOConfig, query: Tensor, shard: SequenceShard) -> bool:
    """Whether `two_chunk_attention` can serve query [s, b, H, D], and is all that the configuration asks for."""
    asks_for_more = (
        config.deterministic_mode
        or config.attention_dropout > 0
        or config.fp8_dot_product_attention
        or config.attention_backend not in (AttnBackend.auto, AttnBackend.fused)
    )
    if asks_for_more or shard.ranks == 1 or shard.document_ids is not None:
        return False
    return partial.serves(query.permute(1, 2, 0, 3), shard.chunk_length)


def two_chunk_attention(query: Tensor, reader: SharedKVReader, shard: SequenceShard, scale: float) -> Tensor:
    """query [s, b, H, D] of this rank over the shared K,V of the whole sequence -> [s, b, H * D]."""
    first, second = shard.chunks
    parts, keys_and_values = [_Part(0, True)], [*reader.read_own()]
    if first.start > 0:
        parts.append(_Part(0, False))
        keys_and_values += reader.read(0, first.start)
    if first.stop < second.start:
        parts.append(_Part(shard.chunk_length, False))
        keys_and_values += reader.read(first.stop, second.start)
    return _Joined.apply(query, scale, parts, *keys_and_values).flatten(2)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[s, b, heads, D] -> [b, heads, s, D], views."""
    return [x.permute(1, 2, 0, 3) for x in tensors]


class _Joined(torch.autograd.Function):
    """Parts of one softmax. The first part has all queries."""

    @staticmethod
    def forward(ctx, query, scale, parts, *keys_and_values):
        q, *kv = _heads_first(query, *keys_and_values)
        ctx.scale, ctx.parts, ctx.seen = scale, parts, []
        for index, part in enumerate(parts):
            found, lse_found, seen = partial.forward(
                q[:, :, part.first_query :], *kv[2 * index : 2 * index + 2], part.causal, scale
            )
            ctx.seen.append(seen)
            if index == 0:
                o, lse = found, lse_found
            else:
                partial.join(o[:, :, part.first_query :], lse[..., part.first_query :], found, lse_found)
        ctx.save_for_backward(query, o, lse, *keys_and_values)
        return o.permute(2, 0, 1, 3).contiguous()

    @staticmethod
    def backward(ctx, do):
        query, o, lse, *keys_and_values = ctx.saved_tensors
        q, do, *kv = _heads_first(query, do.contiguous(), *keys_and_values)
        gradients = []
        for index, (part, seen) in enumerate(zip(ctx.parts, ctx.seen)):
            at = part.first_query
            rows = [x[:, :, at:] for x in (do, q)]
            dq_part, dk, dv = partial.backward(
                *rows, *kv[2 * index : 2 * index + 2], o[:, :, at:], lse[..., at:], seen, part.causal, ctx.scale
            )
            gradients += _sequence_first(dk, dv)
            if index == 0:
                dq = dq_part
            else:
                dq[:, :, at:].add_(dq_part)
        return *_sequence_first(dq), None, None, *gradients


def _sequence_first(*tensors: Tensor) -> list[Tensor]:
    return [x.permute(2, 0, 1, 3) for x in tensors]
