"""Bytes that context parallelism moves: what each rank receives from others for a micro-batch, on average over ranks.

With C ranks, s tokens a sequence (all ranks together), b sequences, e bytes a value, H query heads, G K,V heads and H_s
retention heads of this tensor-parallel rank, widths D of the cross-decoder and D_s of the self-decoder, window W:

    window, a layer and direction     2 (C-1) / C  (W-1) b 2 G_s D_s e      (W - 1 <= s / 2C)
    retention, a layer, forward       (C-1) 2 b H_s (D_s^2 + 1) 4           (states and decays in fp32)
    retention, a layer, backward      (C-1) 2 b H_s D_s^2 4

The cross-decoder needs all keys in one place, or all queries in all places (--cp-cross-attention), m of them:

    keys, a set and stage, forward    (C-1) / C  s b 2 G D e                (K,V; a YOCO has one set)
    keys, a set and stage, backward   (C-1) / C  s b 2 G D 4                (their gradients, summed in fp32)
    queries, a layer, forward         (C-1) / C  m b H (2 D e + 4)          (queries; outputs with log-sum-exp)
    queries, a layer, backward        (C-1) / C  m b H (4 D e + 4)          (queries, outputs with log-sum-exp and their
                                                                            gradients; gradients of queries)

Experts: a token's hidden state of d values goes to each of the k experts that it is routed to, and comes back; with T
tokens on a rank behind sequence parallelism, and E ranks of expert parallelism, each of ETP ranks that share an expert:

    experts, a layer and direction    2 T k d e ((E-1) / E + ETP - 1)       (balanced; forward, and again backward)

A Transformer with ring or all-gather attention receives in every layer the K,V, (C-1) / C s b 2 G D e, forward and
again backward, and their gradients, as much once more. Full recompute repeats what layers do in forward, but not cross
attention with --keep-cross-attention; it does not gather the shared K,V again.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from yoco_megatron.config.memory_units import attention_layers, memory_width
from yoco_megatron.costs.shape import ModelShape


def boundary_bytes(shape: ModelShape, tokens: int, bytes_per_value: int, kv_sets: int, has_memory: bool = False) -> int:
    """Of the tensor that enters a pipeline stage: hidden states, so many sets of the shared K,V, and the memory of
    gated memory units or not."""
    values = shape.hidden_size + kv_sets * shape.kv_width + (memory_width(shape) if has_memory else 0)
    return tokens * values * bytes_per_value


def recomputes_cross_attention(config: Any) -> bool:
    """Whether backward does, by a YOCOConfig or the arguments of a run."""
    if config.recompute_granularity == "selective":
        return "core_attn" in (config.recompute_modules or ["core_attn"])
    return config.recompute_granularity == "full" and not config.keep_cross_attention


def cross_attention_bytes(
    sizes: Any,
    ranks: int,
    length: int,
    queries: int,
    sequences: int = 1,
    bytes_per_value: int = 2,
    kv_reads: int = 1,
    forward_passes: int = 1,
) -> dict[str, float]:
    """Received by cross attention of the whole model in both ways, {"keys": ..., "queries": ...}.

    Args:
        sizes: a ModelShape or a YOCOConfig.
        queries: positions of each sequence that are computed; kv_reads: sets of K,V that each pipeline stage reads, all
            stages together.
        forward_passes: two if cross attention is recomputed.
    """
    others = (ranks - 1) / ranks * sequences
    width = sizes.kv_channels
    rows = queries * sizes.num_attention_heads * attention_layers(sizes)
    forward, backward = (rows * (tensors * width * bytes_per_value + 4) for tensors in (2, 4))
    return {
        "keys": others * kv_reads * length * 2 * sizes.num_query_groups * width * (bytes_per_value + 4),
        "queries": others * (forward * forward_passes + backward),
    }


def cross_attention_bytes_of_run(args: Namespace, shape: ModelShape) -> dict[str, float]:
    """The same for a micro-batch of 16-bit values in one stage, by parsed arguments."""
    return cross_attention_bytes(
        shape,
        args.context_parallel_size,
        args.seq_length,
        shape.computed_queries,
        args.micro_batch_size,
        kv_reads=shape.shared_kv_sets,
        forward_passes=2 if recomputes_cross_attention(args) else 1,
    )


def queries_are_less(received: Mapping[str, float]) -> bool:
    """What --cp-cross-attention auto decides by, where queries can travel at all."""
    return received["queries"] < received["keys"]


def routed_bytes(args: Namespace, shape: ModelShape, kind: str, passes: int) -> float:
    """Received by a rank for the experts of a layer of a kind, in the mean over its layers, in a micro-batch.

    Args:
        passes: forward and backward are two; full recompute is one more.
    """
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    share = shape.query_share if kind == "cross_decoder" else 1.0
    tokens = args.micro_batch_size * args.seq_length * share / (args.context_parallel_size * tp)
    rows = tokens * shape.moe_router_topk * shape.hidden_size * 2
    return shape.experts_share(kind) * 2 * passes * rows * ((ep - 1) / ep + etp - 1)


def travelling(args: Namespace, shape: ModelShape) -> str:
    """keys or queries, on a GPU that can do both (model/cross_decoder/travelling_queries.py)."""
    if shape.num_queries is None or args.cp_cross_attention == "keys":
        return "keys"
    queries = args.cp_cross_attention == "queries" or queries_are_less(cross_attention_bytes_of_run(args, shape))
    return "queries" if queries else "keys"


def received_bytes(
    shape: ModelShape,
    ranks: int,
    micro_batch_size: int = 1,
    bytes_per_value: int = 2,
    recompute: bool = False,
    keep_cross_attention: bool = False,
    travels: str = "keys",
) -> dict[str, float]:
    """Received for a micro-batch of the whole model in one stage, without tensor parallelism, by kind of exchange.

    Keys: self_decoder and cross_decoder for a YOCO, attention for a Transformer.

    Args:
        recompute: backward recomputes every layer, but keep_cross_attention.
        travels: keys or queries, for cross attention.
    """
    others = (ranks - 1) / ranks
    forward_passes = 2 if recompute else 1
    if shape.architecture == "transformer":
        kv = others * shape.seq_length * micro_batch_size * shape.kv_width * bytes_per_value
        return {"attention": shape.num_layers * kv * (forward_passes + 2)}
    layer = shape.mean(
        lambda mixer: mixer.received_bytes(shape, ranks, micro_batch_size, bytes_per_value, forward_passes)
    )
    both = cross_attention_bytes(
        shape,
        ranks,
        shape.seq_length,
        shape.computed_queries,
        micro_batch_size,
        bytes_per_value,
        shape.shared_kv_sets,
        forward_passes=1 if keep_cross_attention else forward_passes,
    )
    return {"self_decoder": shape.num_self_decoder_layers * layer, "cross_decoder": both[travels]}
