"""Seconds, parameters and FLOPs of the parts that a pipeline stage holds."""

import math
from argparse import Namespace
from dataclasses import dataclass

from yoco_megatron.costs.flops import forward_flops_per_token, layer_flops_per_token
from yoco_megatron.costs.shape import ModelShape, parameter_count
from yoco_megatron.parallel.pipeline.stages import Stage

# Achieved FLOP/s of the parts of a layer, 3B in training on one H200, bf16 (docs/performance.md); only their ratios
# matter. Cross attention: 340e12 at 4096 tokens, 490e12 at 131,072. Windows: not measured alone.
RATES = {
    "linear": 700e12,
    "cross_attention": 400e12,
    "window": 400e12,
    "retention": 100e12,
    "retention in torch": 12e12,
}
ELEMENTWISE_SECONDS = 5e-12  # a layer's norms, SwiGLU and residuals, per token and unit of hidden and FFN width
EMBEDDING_SECONDS = 1e-12  # per token and hidden unit: next to nothing
AGAIN = 4 / 3  # what is computed once more in backward: four products where three would do


@dataclass(frozen=True)
class Costs:
    """Seconds per token of each part of a model: a third of forward and backward together, which is the forward pass
    where nothing is computed again."""

    embedding: float
    self_layer: float
    shared_kv: float
    cross_layer: float
    head: float

    @staticmethod
    def of(
        shape: ModelShape,
        layers_again: bool = False,
        logits_again: float = 0.0,
        attention_kept: bool = False,
        retention: str = "retention",
    ) -> "Costs":
        """Estimate from the FLOPs of a YOCO.

        Args:
            layers_again: backward computes every layer once more (full recompute).
            logits_again: and this share of the logits (the loss in chunks, ops/linear_cross_entropy).
            attention_kept: but not cross attention (--keep-cross-attention).
            retention: which rate retention has.
        """
        layers, whole = layer_flops_per_token(shape), forward_flops_per_token(shape)
        mixer = retention if shape.self_decoder == "gated_retention" else "window"

        def seconds(kind: str, mixing: str) -> float:
            if kind not in layers:
                return 0.0
            mixed = layers[kind]["mixing"] / RATES[mixing]
            rest = layers[kind]["linear"] / RATES["linear"]
            rest += ELEMENTWISE_SECONDS * (shape.hidden_size + shape.ffn_hidden_size)
            if not layers_again:
                return rest + mixed
            return rest * AGAIN + mixed * (1 if attention_kept and kind == "cross_decoder" else AGAIN)

        return Costs(
            embedding=shape.hidden_size * EMBEDDING_SECONDS,
            self_layer=seconds("self_decoder", mixer),
            shared_kv=whole["shared_kv"] / RATES["linear"],
            cross_layer=seconds("cross_decoder", "cross_attention"),
            head=whole["output_layer"] / RATES["linear"] * (1 + (AGAIN - 1) * logits_again),
        )

    @staticmethod
    def of_run(shape: ModelShape, args: Namespace) -> "Costs":
        """The same, with what parsed arguments say to compute again."""
        every_layer = args.recompute_granularity == "full" and args.recompute_method == "uniform"
        tokens = args.micro_batch_size * args.seq_length / args.context_parallel_size
        chunks = math.ceil(tokens / args.loss_chunk_size) if args.loss_chunk_size else 1
        retention = "retention in torch" if args.retention_backend == "torch" else "retention"
        return Costs.of(shape, every_layer, 1 - 1 / chunks, args.keep_cross_attention, retention)

    def stage(self, stage: Stage, border: int) -> float:
        """Seconds per token of one stage, as above."""
        n_self, n_cross = stage.split(border)
        return (
            n_self * self.self_layer
            + n_cross * self.cross_layer
            + stage.pre_process * self.embedding
            + stage.makes_kv * self.shared_kv
            + stage.post_process * self.head
        )


def stage_parameters(stage: Stage, border: int, shape: ModelShape) -> int:
    """Parameters that a stage holds; a tied head on a stage of its own is a copy of the embedding."""
    parameters = parameter_count(shape)
    n_self, n_cross = stage.split(border)
    count = parameters["self_decoder"] * n_self // max(1, border)
    count += parameters["cross_decoder"] * n_cross // (shape.num_layers - border)
    count += stage.pre_process * parameters["embedding"] + stage.makes_kv * parameters["shared_kv"]
    if stage.post_process:
        copied = parameters["embedding"] if shape.tied and not stage.pre_process else 0
        count += parameters["final_norm"] + parameters["output_layer"] + copied
    return count


def stage_gflop(stage: Stage, border: int, shape: ModelShape) -> float:
    """Training GFLOP per token of a stage: three times the forward pass, whatever is computed again."""
    layers, whole = layer_flops_per_token(shape), forward_flops_per_token(shape)
    n_self, n_cross = stage.split(border)
    flops = n_self * sum(layers["self_decoder"].values()) if n_self else 0.0
    flops += n_cross * sum(layers["cross_decoder"].values())
    flops += stage.makes_kv * whole["shared_kv"] + stage.post_process * whole["output_layer"]
    return 3 * flops / 1e9
