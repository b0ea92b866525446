"""Recurrences over the tokens of a shard: documents, and chunks of context parallelism."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.gated_retention import gated_retention
from yoco_megatron.ops.gated_retention.chunk_state import state_gradient, state_update
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.parallel.context.state_exchange import StateExchange


def over_chunks(
    op: Callable[..., tuple[Tensor, Tensor]],
    update: Callable[..., tuple[Tensor, Tensor]],
    gradient: Callable[..., Tensor],
    shard: SequenceShard,
    query: Callable[[], Tensor],
    *inputs: Tensor,
) -> Tensor:
    """The outputs [s, b, H, V] of an op with a recurrent state.

    Shapes: query() [s, b, H, K], called while states are exchanged, and the op's other inputs [s, b, H, ...].

    Args:
        op: `op(q, *inputs, initial_state=, document_ids=)` -> (outputs, final state).
        update, gradient: `update(*inputs, document_ids=)` and `gradient(do, q, *inputs, document_ids=)`, what a chunk
            does to the state that enters it, and what its outputs send back there (the ops' `chunk_state`).
    """
    inputs = tuple(shard.fold(x) for x in inputs)
    ids, exchange, initial = shard.folded_document_ids, None, None
    if shard.ranks > 1:
        with torch.no_grad():
            exchange = StateExchange(*update(*inputs, document_ids=ids), shard)
    q = shard.fold(query())
    if exchange:
        initial = exchange.initial_states()
    o, final = op(q, *inputs, initial_state=initial, document_ids=ids)
    if exchange:
        o = exchange.attach_final_state_grad(o, final, partial(gradient, document_ids=ids), q, *inputs)
    return shard.unfold(o)


def recurrence(
    query: Callable[[], Tensor],
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    shard: SequenceShard,
    config: YOCOConfig,
    backend: str,
    scale: float | None = None,
) -> Tensor:
    """That of gated retention, S_t = exp(g_t) S_{t-1} + scale k_t^T v_t, o_t = q_t S_t.

    Shapes: query() and k [s, b, H, K], or of fewer heads, each for as many of v's; v and the result [s, b, H, V];
    log_decay [s, b, H], fp32. `scale` is K^-1/2 by default.
    """

    def gradient(do: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, document_ids: Tensor | None) -> Tensor:
        return state_gradient(do, q, log_decay, document_ids)

    op = partial(gated_retention, scale=scale, chunk_size=config.retention_chunk_size, backend=backend)
    return over_chunks(op, partial(state_update, scale=scale), gradient, shard, query, k, v, log_decay)
