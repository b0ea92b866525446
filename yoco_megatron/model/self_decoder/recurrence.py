"""The recurrence of gated retention over the tokens of a shard: documents, and chunks of context parallelism."""

from collections.abc import Callable

from torch import Tensor

from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.gated_retention import gated_retention
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.parallel.context.state_exchange import StateExchange


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
    """S_t = exp(g_t) S_{t-1} + scale k_t^T v_t, o_t = q_t S_t.

    Shapes: query() and k [s, b, H, K]; v and the result [s, b, H, V]; log_decay [s, b, H], fp32. `query` is called
    while states are exchanged. `scale` is K^-1/2 by default.
    """
    k, v, log_decay = shard.fold(k), shard.fold(v), shard.fold(log_decay)
    exchange = StateExchange.start(k, v, log_decay, shard, scale) if shard.ranks > 1 else None
    q = shard.fold(query())
    o, final = gated_retention(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=exchange.initial_states() if exchange else None,
        document_ids=shard.folded_document_ids,
        chunk_size=config.retention_chunk_size,
        backend=backend,
    )
    return shard.unfold(exchange.attach_final_state_grad(o, final, q, log_decay) if exchange else o)
