"""FLOPs of what backward computes again: once more the products of forward.

full recompute        layers whole (--recompute-method block: the first N of each half of a stage), but for the
                      attention that --keep-cross-attention keeps, and without the source of the units' memory
selective             the modules that are named: the FFN, or what mixes tokens
--mlp-chunks-for-training   the FFN, part by part
--loss-chunk-size     the logits of all chunks but the last
"""

from argparse import Namespace

from yoco_megatron.costs.flops import forward_flops_per_token, layer_flops_per_token
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import LAYERS, Parts, loss_chunks, recomputed_layers


def recomputed_flops_per_token(
    args: Namespace, shape: ModelShape, stage: Parts, source: int | None = None
) -> dict[str, dict[str, float]]:
    """{part of a stage: {"linear": FLOPs, "mixing": FLOPs}} of all layers of its kind, per token of a sequence;
    `source`: of `memory_sources`."""
    found = {}
    of_layers = layer_flops_per_token(shape)
    for kind in LAYERS:
        if not (count := stage.get(kind, 0)):
            continue
        linear, mixing = of_layers[kind]["linear"], of_layers[kind]["mixing"]
        share = shape.query_share if kind == "cross_decoder" else 1.0
        ffn = 2 * 3 * shape.hidden_size * shape.ffn_hidden_size * (1 - shape.experts_share(kind)) * share
        again = {"linear": 0.0, "mixing": 0.0}
        if args.recompute_granularity == "full":
            layers = recomputed_layers(args, kind, count, source)
            again["linear"] += layers * linear
            again["mixing"] += layers * mixing * (not (kind == "cross_decoder" and args.keep_cross_attention))
        elif args.recompute_granularity == "selective":
            modules = args.recompute_modules or ["core_attn"]
            again["linear"] += count * ffn * ("mlp" in modules)
            again["mixing"] += count * mixing * ("core_attn" in modules)
        if args.architecture == "yoco" and args.mlp_chunks_for_training > 1:
            again["linear"] += count * ffn
        found[kind] = again
    if stage.get("output_layer"):
        logits = forward_flops_per_token(shape)["output_layer"]
        found["output_layer"] = {"linear": logits * (1 - 1 / loss_chunks(args, shape)), "mixing": 0.0}
    return found
