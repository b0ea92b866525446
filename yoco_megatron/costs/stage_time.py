"""Seconds, parameters and FLOPs of what a pipeline stage holds.

Layers of the two halves do not cost the same: a retention layer has a fifth matrix, a cross-decoder layer's attention
grows with the sequence, the projection to the shared K,V and the head belong to one stage each.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from yoco_megatron.config.kv_sets import layers_of_sets, sets_arriving, sources_of
from yoco_megatron.config.memory_units import memory_cuts
from yoco_megatron.costs.flops import forward_flops_per_token, layer_flops_per_token
from yoco_megatron.costs.shape import ModelShape, layer_linear_values, parameter_count, routed_parameters
from yoco_megatron.mixers import Mixer

Parts = Mapping[str, int]
"""How many of each part a stage holds: embedding, self_decoder (layers), shared_kv (sources), cross_decoder (layers),
mtp (all layers of multi-token prediction), output_layer (a Transformer: embedding, decoder, output_layer). A missing
one is 0."""
Seconds = Mapping[str, float]
"""Of each of these parts, one layer or the whole, for a token: a third of forward and backward together, which is the
forward time without recompute."""


@dataclass(frozen=True)
class Rates:
    """Of a GPU in training."""

    linear: float
    """FLOP/s of the layers' matrix products."""
    attention: float
    """FLOP/s of causal attention."""
    output_layer: float
    """FLOP/s of the head and its loss."""
    elementwise: float
    """Seconds of a layer's norms, SwiGLU and residuals, per token and unit of hidden and FFN width."""
    cast: float = 0.0
    """Seconds to cast a value of a linear layer's input or output gradient to FP8."""
    mixing: Mapping[str, float] = field(default_factory=dict)
    """FLOP/s of mixers by name; of others, and of the torch implementation, it is in their records."""


# 3B on one H200, bf16 (benchmarks/NOTES.md). The pipeline planner needs their ratios alone, and cuts every run alike.
PLANNER_RATES = Rates(linear=700e12, attention=400e12, output_layer=700e12, elementwise=5e-12)
EMBEDDING_SECONDS = 1e-12  # per token and hidden unit: next to nothing
RECOMPUTE_FACTOR = 4 / 3  # of what is recomputed in backward: four products where three would do


LAYERS = ("self_decoder", "cross_decoder", "decoder")


def part_seconds(
    shape: ModelShape,
    recompute_layers: bool = False,
    recomputed_logits: float = 0.0,
    store_cross_attention: bool = False,
    mixer_backend: str = "auto",
    rates: Rates = PLANNER_RATES,
) -> Seconds:
    """Estimate of the seconds of each part from its FLOPs.

    Args:
        recompute_layers: backward recomputes every layer (full recompute),
        store_cross_attention: but not cross attention (--keep-cross-attention).
        recomputed_logits: the share of the logits that backward recomputes (the loss in chunks).
        mixer_backend: which implementation the self-decoder's mixer has (--retention-backend).
    """
    layers, whole = layer_flops_per_token(shape), forward_flops_per_token(shape)
    values = layer_linear_values(shape)

    def layer_seconds(kind: str, mixing: float) -> float:
        rest = layers[kind]["linear"] / rates.linear
        share = shape.query_share if kind == "cross_decoder" else 1
        rest += rates.elementwise * (shape.hidden_size + shape.ffn_width(kind)) * share
        rest += rates.cast * values[kind] / 3 * share
        if not recompute_layers:
            return rest + mixing
        stored = store_cross_attention and kind == "cross_decoder"
        return rest * RECOMPUTE_FACTOR + mixing * (1 if stored else RECOMPUTE_FACTOR)

    head = whole["output_layer"] / rates.output_layer * (1 + (RECOMPUTE_FACTOR - 1) * recomputed_logits)
    ends = {"embedding": shape.hidden_size * EMBEDDING_SECONDS, "output_layer": head}
    if shape.architecture == "transformer":
        return ends | {"decoder": layer_seconds("decoder", layers["decoder"]["mixing"] / rates.attention)}

    def own_mixing(mixer: Mixer) -> float:
        rate = mixer.flop_rate(mixer_backend)
        return mixer.mixing_flops(shape) / (rate if mixer_backend == "torch" else rates.mixing.get(mixer.name, rate))

    projections = 4 * shape.mtp_num_layers * shape.hidden_size**2 * shape.query_share / rates.linear
    of_mtp = cross = layer_seconds("cross_decoder", layers["cross_decoder"]["mixing"] / rates.attention)
    if shape.mtp_num_layers and shape.of_mtp is not shape:
        again = (recompute_layers, recomputed_logits, store_cross_attention)
        of_mtp = part_seconds(shape.of_mtp, *again, mixer_backend, rates)["cross_decoder"]
    return ends | {
        "self_decoder": layer_seconds("self_decoder", shape.mean(own_mixing)),
        "shared_kv": layers["shared_kv"]["linear"] / rates.linear,
        "cross_decoder": cross,
        **({"mtp": shape.mtp_num_layers * of_mtp + projections} if shape.mtp_num_layers else {}),
    }


def part_seconds_of_run(
    shape: ModelShape, args: Namespace, rates: Rates = PLANNER_RATES, recompute_layers: bool | None = None
) -> Seconds:
    """The same, with what parsed arguments say to recompute."""
    every_layer = args.recompute_granularity == "full" and args.recompute_method == "uniform"
    if recompute_layers is not None:
        every_layer = recompute_layers
    logits = 1 - 1 / loss_chunks(args, shape)
    return part_seconds(shape, every_layer, logits, args.keep_cross_attention, args.retention_backend, rates)


def loss_chunks(args: Namespace, shape: ModelShape) -> int:
    """In which the logits of a micro-batch are computed, one at a time."""
    if not args.loss_chunk_size:
        return 1
    rows = args.micro_batch_size * args.seq_length * shape.query_share / args.context_parallel_size
    return math.ceil(rows / args.loss_chunk_size)


def recomputed_layers(args: Namespace, kind: str, held: int, source: int | None = None) -> int:
    """Of so many layers of a kind on a stage, those that full recompute takes: with --recompute-method block the
    first N.

    Args:
        source: of `memory_sources`: the place of a layer of the self-decoder that is left out.
    """
    if args.recompute_granularity != "full":
        return 0
    taken = min(held, args.recompute_num_layers or 1) if args.recompute_method == "block" else held
    return taken - (kind == "self_decoder" and source is not None and source < taken)


def stage_seconds(parts: Parts, seconds: Seconds) -> float:
    """Seconds per token of one stage."""
    return sum(count * seconds[part] for part, count in parts.items())


def kv_sets_read(stages: Sequence[Parts], shape: ModelShape) -> list[range]:
    """The sets of K,V that each stage reads, counted from 0; `stages` in the order that a micro-batch visits them."""
    held = [stage.get("cross_decoder", 0) for stage in stages]
    held[-1] += shape.mtp_num_layers if stages[-1].get("mtp") else 0
    readers, read = _layers_of_sets(shape), []
    for first, last in pairwise(accumulate(held, initial=shape.num_self_decoder_layers)):
        here = [number for number, layers in enumerate(readers) if max(first, layers.start) < min(last, layers.stop)]
        read.append(range(here[0], here[-1] + 1) if here else range(0))
    return read


def kv_sets_arriving(stages: Sequence[Parts], shape: ModelShape) -> list[range]:
    """The sets of K,V that enter each stage from the one before."""
    if shape.architecture == "transformer":
        return [range(0)] * len(stages)
    return [sets_arriving(_cuts(stages), sources_of(shape), _layers_of_sets(shape), g) for g in range(len(stages))]


def memory_of_stages(stages: Sequence[Parts], shape: ModelShape) -> list[tuple[bool, bool]]:
    """(whether the memory of gated memory units is made in a stage, whether it enters it from the one before)."""
    crossed = memory_cuts(shape)
    sources = memory_sources(stages, shape)
    return [(source is not None, first in crossed) for source, first in zip(sources, _cuts(stages))]


def memory_sources(stages: Sequence[Parts], shape: ModelShape) -> list[int | None]:
    """Of each stage the place, among its layers, of the one that makes the memory of units, if it is there."""
    source = memory_cuts(shape).start - 1
    return [source - first if first <= source < last else None for first, last in pairwise(_cuts(stages))]


def _layers_of_sets(shape: ModelShape) -> list[range]:
    split_layer, pattern = shape.num_self_decoder_layers, shape.cross_decoder_pattern
    return layers_of_sets(shape.num_layers, split_layer, shape.shared_kv_sets, shape.mtp_num_layers, pattern)


def _cuts(stages: Sequence[Parts]) -> list[int]:
    layers = (stage.get("self_decoder", 0) + stage.get("cross_decoder", 0) for stage in stages)
    return [*accumulate(layers, initial=0)]


def shapes_of_ranks(stages: Sequence[Parts], shape: ModelShape, ranks: int) -> list[ModelShape]:
    """For each pipeline rank `shape` with means over the layers that it holds."""
    if not shape.layers_differ:
        return [shape] * ranks
    edges = [*accumulate((sum(stage.get(kind, 0) for kind in LAYERS) for stage in stages), initial=0)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    for index, (first, stop) in enumerate(pairwise(edges)):
        held[index % ranks] += range(first, stop)
    return [shape.of_layers(layers) for layers in held]


def of_rank(chunks: Sequence[Parts]) -> Parts:
    """What a pipeline rank holds in all its model chunks."""
    if len(chunks) == 1:
        return chunks[0]
    total: dict[str, int] = {}
    for chunk in chunks:
        for part, count in chunk.items():
            total[part] = total.get(part, 0) + count
    return total


def stage_parameters(parts: Parts, shape: ModelShape) -> int:
    """Parameters that a stage holds; a stage without the embedding has a copy of it for a tied head, or for multi-token
    prediction."""
    parameters = parameter_count(shape)
    layers = {"self_decoder": shape.num_self_decoder_layers, "cross_decoder": shape.num_cross_decoder_layers}
    layers |= {"decoder": shape.num_layers, "shared_kv": len(sources_of(shape))}
    count = sum(parameters[part] // max(1, layers.get(part, 1)) * held for part, held in parts.items())
    if parts.get("output_layer"):
        copied = (shape.tied or parts.get("mtp")) and not parts.get("embedding")
        count += parameters["final_norm"] + (parameters["embedding"] if copied else 0)
    return count


def held_parameters(args: Namespace, shape: ModelShape, parts: Parts) -> tuple[float, float]:
    """(all but routed experts, routed experts) that a rank of a stage holds."""
    tp = args.tensor_model_parallel_size
    routed = sum(count * routed_parameters(shape, kind) for kind, count in parts.items() if kind in LAYERS)
    expert_ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tp) if routed else tp
    # Each rank multiplies its own rows by the whole of these (model/multi_token_prediction.py).
    projections = 2 * shape.mtp_num_layers * shape.hidden_size**2 if parts.get("mtp") else 0
    return (stage_parameters(parts, shape) - routed - projections) / tp + projections, routed / expert_ranks


def stage_gflop(parts: Parts, shape: ModelShape) -> float:
    """Training GFLOP per token of a stage: three times the forward pass, whatever is recomputed."""
    whole = forward_flops_per_token(shape)
    flops = {kind: sum(layer.values()) for kind, layer in layer_flops_per_token(shape).items()}
    flops |= {"embedding": 0.0, "output_layer": whole["output_layer"]}
    return 3 * sum(count * flops[part] for part, count in parts.items()) / 1e9
