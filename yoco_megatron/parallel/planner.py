"""Where to cut a YOCO into pipeline stages, so that the slowest stage is as fast as possible.

Layers of the two halves do not cost the same: a retention layer has a fifth matrix, a cross-decoder layer's attention
grows with the sequence, the projection to the shared K,V and the head belong to one stage each. The planner turns FLOPs
into time with the rates below and finds contiguous cuts.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from yoco_megatron.config.rules import require
from yoco_megatron.config.shape import ModelShape, parameter_count
from yoco_megatron.model.stage import Stage
from yoco_megatron.parallel.stages import StagePlan
from yoco_megatron.training.flops import forward_flops_per_token, layer_flops_per_token

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


def plan_cuts(num_layers: int, border: int, ranks: int, chunks: int, costs: Costs) -> list[int]:
    """Layers per stage: contiguous, at least one each; the busiest rank as short as can be, then the longest stage.

    With one chunk a rank this is exact. With several, layers move between neighbouring stages while that helps the
    busiest rank, from the cuts with the shortest longest stage and from even ones.

    Raises:
        ValueError: more stages than layers.
    """
    stages = ranks * chunks
    require(
        stages <= num_layers,
        f"{stages} pipeline stages (ranks x virtual stages) are more than --num-layers {num_layers}: use a smaller "
        "--pipeline-model-parallel-size or fewer virtual stages",
    )

    def seconds(first: int, last: int) -> float:
        makes_kv = first < border <= last or border == first == 0
        return costs.stage(Stage(first, last, first == 0, last == num_layers, makes_kv), border)

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """(longest stage, sum of squares, counts) of layers [first, num_layers) in `left` stages."""
        if left == 1:
            own = seconds(first, num_layers)
            return own, own * own, (num_layers - first,)
        options = []
        for last in range(first + 1, num_layers - left + 2):
            own = seconds(first, last)
            longest, squares, counts = best(last, left - 1)
            options.append((max(own, longest), squares + own * own, (last - first, *counts)))
        return min(options)

    shortest = list(best(0, stages)[2])
    if chunks == 1:
        return shortest
    even = [num_layers * (g + 1) // stages - num_layers * g // stages for g in range(stages)]
    return _balance_ranks([shortest, even], ranks, seconds)


def _balance_ranks(starts: list[list[int]], ranks: int, seconds: Callable[[int, int], float]) -> list[int]:
    """Move single layers between neighbours while (busiest rank, longest stage, unevenness) gets smaller."""

    def price(counts: list[int]) -> tuple[float, float, float]:
        stages = [seconds(first, last) for first, last in pairwise([0, *accumulate(counts)])]
        of_rank = [sum(stages[rank::ranks]) for rank in range(ranks)]
        return max(of_rank), max(stages), sum(t * t for t in of_rank)

    def improve(counts: list[int]) -> list[int]:
        while True:
            cheapest = min((counts, *_moves(counts)), key=price)
            if price(cheapest) >= price(counts):
                return counts
            counts = cheapest

    return min((improve(counts) for counts in starts), key=price)


def _moves(counts: list[int]) -> Iterator[list[int]]:
    """All cuts that differ by one layer across one boundary."""
    for left, right in pairwise(range(len(counts))):
        for giver, taker in ((left, right), (right, left)):
            if counts[giver] > 1:
                moved = counts.copy()
                moved[giver] -= 1
                moved[taker] += 1
                yield moved


def bubbles(per_stage: list[float], ranks: int, num_microbatches: int) -> list[float]:
    """Expected idle share of every pipeline rank, 1F1B or interleaved.

    One step lasts m T_max + (sum of the other ranks' times) / V, with T the time of a micro-batch on a rank and V
    chunks a rank: for equal stages (P-1) / (m V + P-1), the known figure.
    """
    chunks = len(per_stage) // ranks
    of_rank = [sum(per_stage[rank::ranks]) for rank in range(ranks)]
    longest = max(of_rank)
    total = num_microbatches * longest + (sum(of_rank) - longest) / chunks
    return [1 - num_microbatches * own / total for own in of_rank]


def table(
    plan: StagePlan,
    shape: ModelShape,
    costs: Costs,
    ranks: int,
    num_microbatches: int,
    micro_batch_size: int,
    bytes_per_value: int,
) -> str:
    """What the planner prints: a line a stage, as text."""
    seconds = [costs.stage(plan.stage(g), plan.border) for g in range(plan.count)]
    idle = bubbles(seconds, ranks, num_microbatches)
    kv_width = 2 * shape.num_query_groups * shape.kv_channels
    tokens = micro_batch_size * shape.seq_length

    def megabytes(g: int) -> float:
        """Of the tensor that enters stage g."""
        width = shape.hidden_size + kv_width * plan.kv_arrives(g)
        return tokens * width * bytes_per_value / 1e6 if 0 < g < plan.count else 0.0

    lines = [
        f"pipeline: {plan.count} stages on {ranks} ranks, {num_microbatches} micro-batches of {micro_batch_size} x "
        f"{shape.seq_length} tokens (bytes and parameters before tensor and context parallelism)",
        f"{'stage':>5} {'rank':>4} {'self':>4} {'cross':>5} {'also':<14} {'parameters':>13} {'GFLOP/token':>11} "
        f"{'time':>5} {'recv MB':>8} {'send MB':>8} {'bubble':>6}",
    ]
    for g in range(plan.count):
        stage = plan.stage(g)
        n_self, n_cross = stage.split(plan.border)
        parts = {"embed": stage.pre_process, "K,V": stage.makes_kv, "head": stage.post_process}
        also = " ".join(name for name, held in parts.items() if held)
        lines.append(
            f"{g:>5} {g % ranks:>4} {n_self:>4} {n_cross:>5} {also:<14} "
            f"{stage_parameters(stage, plan.border, shape):>13,} {stage_gflop(stage, plan.border, shape):>11.3g} "
            f"{seconds[g] / max(seconds):>5.0%} {megabytes(g):>8.2f} {megabytes(g + 1):>8.2f} {idle[g % ranks]:>6.1%}"
        )
    return "\n".join(lines)


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
