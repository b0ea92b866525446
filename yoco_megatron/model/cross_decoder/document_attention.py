"""Cross attention over packed documents: the calls that `DocumentCalls` has planned.

Each call is one of Transformer Engine's (or torch's) for sequences of different lengths, laid end to end.
"""

from types import SimpleNamespace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedKVReader

# Megatron's enum has no name for Transformer Engine's mask of packed documents with fewer queries than keys.
PADDING_CAUSAL_BOTTOM_RIGHT = SimpleNamespace(name="padding_causal_bottom_right")


def document_attention(core_attention: MegatronModule, kv_reader: SharedKVReader, query: Tensor) -> Tensor:
    """query [m, b, H, D] over the shared K,V of each query's document -> [m, b, H * D]."""
    plan = kv_reader.documents
    assert plan is not None
    q_THD = query.flatten(0, 1)
    if plan.query_rows is not None:
        q_THD = _LayOut.apply(q_THD, plan.query_rows, plan.query_places)
    lengths = [call.num_queries for call in plan.calls]
    outputs = [
        core_attention(
            queries,
            *(x.squeeze(1) for x in kv_reader.read(0, call.num_keys, call.laid_out)),
            None,
            _mask(call.packed),
            packed_seq_params=call.packed,
        )
        for call, queries in zip(plan.calls, q_THD.split(lengths) if len(lengths) > 1 else [q_THD])
    ]
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if plan.query_rows is not None:
        out = _TakeBack.apply(out, plan.query_rows, plan.query_places)
    return out.unflatten(0, query.shape[:2])


def _mask(packed: PackedSeqParams) -> AttnMaskType | SimpleNamespace:
    is_square = packed.cu_seqlens_q is packed.cu_seqlens_kv
    return AttnMaskType.padding_causal if is_square else PADDING_CAUSAL_BOTTOM_RIGHT


class _LayOut(torch.autograd.Function):
    """x[rows], some rows more than once; a row's gradient is that at its place, as the others are not used."""

    @staticmethod
    def forward(ctx, x, rows, places):
        ctx.places = places
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.places), None, None


class _TakeBack(torch.autograd.Function):
    """x[places], each place once: its gradient needs none of the atomics of torch's index_select."""

    @staticmethod
    def forward(ctx, x, rows, places):
        ctx.rows, ctx.places, ctx.length = rows, places, len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.length == len(gradient):
            return gradient.index_select(0, ctx.rows), None, None
        whole = gradient.new_zeros(ctx.length, *gradient.shape[1:])
        return whole.index_copy_(0, ctx.places, gradient), None, None
