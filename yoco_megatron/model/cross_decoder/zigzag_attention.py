"""Causal attention of a rank's two zig-zag chunks without a masked rectangle.

Queries of chunk c attend to the keys before it and, causally, to its own. One call for each chunk would put a causal
mask into the lower right corner of a rectangle. Instead, with rank r's chunks r and N - 1 - r, masked calls are square:

    own      both chunks' queries, both chunks' keys: one causal square, in which the second chunk attends to all of the
             first
    early    both chunks' queries, keys of chunks 0 .. r - 1: no mask
    middle   the second chunk's queries, keys of chunks r + 1 .. N - 2 - r: no mask

In units of chunk_length^2 they cost 2, 2r and N - 2 - 2r: as much on every rank.
"""

import torch
from torch import Tensor

from yoco_megatron.model.cross_decoder import attention_in_parts
from yoco_megatron.model.cross_decoder.attention_in_parts import Part, heads_first, sequence_first
from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedKVReader
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


def is_supported(config: YOCOConfig, query: Tensor, shard: SequenceShard) -> bool:
    """True if `zigzag_attention` can compute attention of query [s, b, H, D] and do all that the config asks for."""
    if shard.ranks == 1 or shard.document_ids is not None:
        return False
    return attention_in_parts.is_supported(config, query.device, shard.chunk_length)


def zigzag_attention(query: Tensor, kv_reader: SharedKVReader, shard: SequenceShard, scale: float) -> Tensor:
    """query [s, b, H, D] of this rank over the shared K,V of the whole sequence -> [s, b, H * D]."""
    first, second = shard.chunks
    tokens = shard.local_length
    parts, keys_and_values = [Part(0, tokens, True)], [*kv_reader.read_own()]
    if first.start > 0:
        parts.append(Part(0, tokens, False))
        keys_and_values += kv_reader.read(0, first.start)
    if first.stop < second.start:
        parts.append(Part(shard.chunk_length, tokens, False))
        keys_and_values += kv_reader.read(first.stop, second.start)
    return _ZigZagAttention.apply(query, scale, parts, *keys_and_values).flatten(2)


class _ZigZagAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, scale, parts, *keys_and_values):
        q, *kv = heads_first(query, *keys_and_values)
        o, lse, ctx.rng_states = attention_in_parts.forward(q, kv, parts, scale)
        ctx.scale, ctx.parts = scale, parts
        ctx.save_for_backward(query, o, lse, *keys_and_values)
        return o.permute(2, 0, 1, 3).contiguous()

    @staticmethod
    def backward(ctx, do):
        query, o, lse, *keys_and_values = ctx.saved_tensors
        q, do, *kv = heads_first(query, do.contiguous(), *keys_and_values)
        dq, gradients = attention_in_parts.backward(do, q, kv, o, lse, ctx.parts, ctx.rng_states, ctx.scale)
        return *sequence_first(dq), None, None, *sequence_first(*gradients)
