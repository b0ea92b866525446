"""Seconds of a training step on a mesh: the slowest pipeline rank's kernels, then what no kernel hides.

    step    m T_max + what the slowest rank waits for others        (`schedule`)
            + sends of the pipeline + gradients and weights of data parallelism + optimizer + a fixed part

T is the time of a micro-batch on a rank: its products, attention and elementwise kernels by the rates of the card, or
the host's time to launch them where that is longer, and what tensor and context parallelism send. Measured rows beside
it: tests/costs/test_measured.py. Sends between nodes are by the card's figures; no run of ours has measured them.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yoco_megatron.config.memory_units import attention_layers
from yoco_megatron.costs.card import Card
from yoco_megatron.costs.flops import train_flops
from yoco_megatron.costs.memory import data_parallel_size, num_microbatches
from yoco_megatron.costs.optimizer import is_distributed, newton_schulz_flops
from yoco_megatron.costs.schedule import about_waiting_seconds, waiting_seconds
from yoco_megatron.costs.shape import ModelShape, attention_parameters, layer_matmul_parameters
from yoco_megatron.costs.stage_time import (
    LAYERS,
    RECOMPUTE_FACTOR,
    Parts,
    Rates,
    held_parameters,
    kv_sets_arriving,
    kv_sets_read,
    loss_chunks,
    memory_of_stages,
    memory_sources,
    of_rank,
    part_seconds_of_run,
    recomputed_layers,
    shapes_of_ranks,
    stage_parameters,
)
from yoco_megatron.costs.teacher import teacher_parts, teacher_shape
from yoco_megatron.costs.traffic import boundary_bytes, cross_attention_bytes_of_run, routed_bytes, travelling

BYTES = 2  # a value on its way: bf16
# All-gathers and reduce-scatters of a layer's hidden states: two of each forward and backward, two gathers once more.
TENSOR_EXCHANGES, RECOMPUTED_EXCHANGES = 10, 4
FORWARD_EXCHANGES = 4 / TENSOR_EXCHANGES
FP8_EXCHANGES = 0.7  # of the bytes: the six gathers are of FP8 values, the four reduce-scatters are not
EXPOSED_WITH_OVERLAP = 0.85  # of them, with --tp-comm-overlap: 3B TP2
EXPOSED_RING = 0.5  # of a Transformer's ring attention
EXPOSED_SENDS = 0.3  # of the sends between interleaved chunks
# Of experts, until runs are measured: rows of a product at which it has half of the rate of large ones, and launches
# of an expert that runs after the others, or of all in one grouped product, as a share of a layer's.
HALF_RATE_ROWS = 256
LAUNCHES_OF_AN_EXPERT, LAUNCHES_OF_A_GROUP = 0.15, 0.5
Layers = Mapping[bool, Mapping[str, Mapping[str, float]]]  # {is it recomputed: {kind: {part: seconds}}}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    parts: Mapping[str, float]
    """{what: seconds} of the slowest pipeline rank: compute, host, tensor, context, the exchange of experts and the
    forward pass of a teacher if there are any, bubble, pipeline, data, optimizer."""
    stages: tuple[Mapping[str, float], ...]
    """{compute, host, tensor, context, experts, teacher: seconds} of a micro-batch on each stage."""

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return sum(self.parts.values())

    def share(self, part: str) -> float:
        """Of the step."""
        return self.parts[part] / self.seconds


def mfu(args: Namespace, shape: ModelShape, card: Card, seconds: float) -> float:
    """Of a step in `seconds`, by the card's data sheet."""
    return train_flops(shape, args.global_batch_size) / args.world_size / seconds / card.peak


def step_time(
    args: Namespace, shape: ModelShape, stages: Sequence[Parts], card: Card, by_schedule: bool = True
) -> StepTime:
    """Of arguments whose vocabulary and global batch are known; `stages` as for `memory.gpu_memory`.

    Args:
        by_schedule: follow the pipeline's schedule pass by pass; otherwise in a hundredth of the time, nearly so.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, dp = args.context_parallel_size, data_parallel_size(args)
    model_chunks, count = len(stages) // pp, num_microbatches(args) or 1
    tokens = args.seq_length * args.micro_batch_size / cp

    kinds = (False, True) if args.recompute_granularity == "full" else (False,)
    shapes = shapes_of_ranks(stages, shape, len(stages))
    layers = {
        means_over: {again: _layers(args, each, card, again) for again in kinds}
        for means_over, each in {each.means_over: each for each in shapes}.items()
    }
    read = kv_sets_read(stages, shape)
    teacher = teacher_shape(args, shape)
    distinct: dict[Any, dict[str, float]] = {}  # of some twenty stages a handful
    sources = memory_sources(stages, shape)
    of_stages = list(zip(shapes, stages, read, sources))
    keys = [(each.means_over, *stage.items(), len(sets), source) for each, stage, sets, source in of_stages]
    for key, (each, stage, sets, source) in zip(keys, of_stages):
        if key not in distinct:
            distinct[key] = _stage(args, each, card, stage, len(sets), layers[each.means_over], source)
            if teacher:
                distinct[key]["teacher"] = _teacher_seconds(args, shape, teacher, card, stage)
    per_stage = tuple(distinct[key] for key in keys)
    ranks = [{part: sum(stage[part] for stage in per_stage[rank::pp]) for part in per_stage[0]} for rank in range(pp)]
    totals = [sum(rank.values()) for rank in ranks]
    slowest = max(range(pp), key=totals.__getitem__)

    times = [sum(stage.values()) for stage in per_stage]
    forward = 1 / 4 if args.recompute_granularity == "full" else 1 / 3
    if teacher:
        of_teacher = sum(stage["teacher"] for stage in per_stage) / sum(times)
        forward = of_teacher + forward * (1 - of_teacher)
    waiting = waiting_seconds if by_schedule else about_waiting_seconds
    bubble = waiting(times, pp, count, forward)
    sends = 0.0
    if pp > 1:
        # The boundary that most crosses holds up the others.
        crossing = zip(kv_sets_arriving(stages, shape), memory_of_stages(stages, shape))
        size = max(boundary_bytes(shape, 1, BYTES, len(sets), arrives) for sets, (_, arrives) in crossing) * tokens / tp
        if teacher and not args.attention_transfer:
            size += BYTES * teacher.hidden_size * tokens / tp
        both_ways = 2 * card.link(args.world_size).seconds(size)
        exposed = 1.0 if model_chunks == 1 else EXPOSED_SENDS * model_chunks
        sends = both_ways * (count * exposed + 2 * (pp - 1))

    of_ranks = [*zip(shapes_of_ranks(stages, shape, pp), (of_rank(stages[rank::pp]) for rank in range(pp)))]
    held = max(stage_parameters(parts, each) for each, parts in of_ranks) / tp
    shards = dp * cp
    # fp32 gradients one way, bf16 weights back, beside the backward and the forward pass of one micro-batch.
    sent = max(_reduced_parameters(args, each, parts, shards) for each, parts in of_ranks) * 6
    reduced = sent / card.link(args.world_size).bytes_per_second
    reduced = max(0.05 * reduced, reduced - totals[slowest])
    # Ranks of tensor parallelism each make the whole of Muon's updates (--muon-tp-mode duplicated).
    of_muon = max(newton_schulz_flops(args, each, parts) for each, parts in of_ranks)
    optimizer = card.optimizer_ps * 1e-12 * held + of_muon / (card.linear_tflops * 1e12)
    optimizer /= shards if is_distributed(args) else 1
    optimizer += (card.step_ms + card.step_layer_ms * shape.num_layers / pp) * 1e-3
    parts = {part: count * seconds for part, seconds in ranks[slowest].items()}
    return StepTime(parts | {"bubble": bubble, "pipeline": sends, "data": reduced, "optimizer": optimizer}, per_stage)


def _reduced_parameters(args: Namespace, shape: ModelShape, parts: Parts, shards: int) -> float:
    """Of a rank that holds `parts`, those that it sends to others of its data parallelism; experts have less of it."""
    tp = args.tensor_model_parallel_size
    dense, routed = held_parameters(args, shape, parts)
    expert_ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tp)
    expert_shards = shards * tp / expert_ranks
    return dense * (1 - 1 / shards) + routed * (1 - 1 / expert_shards if routed else 0)


def _layers(args: Namespace, shape: ModelShape, card: Card, recompute: bool) -> dict[str, dict[str, float]]:
    """{kind: seconds of a micro-batch by part} of one layer of each kind, or of another part of a stage; host: of its
    launches, most of them while the GPU works."""
    tp, cp, sequences = args.tensor_model_parallel_size, args.context_parallel_size, args.micro_batch_size
    tokens = args.seq_length * sequences / cp
    seconds = part_seconds_of_run(shape, args, card.rates(args), recompute)
    exchanges: float = TENSOR_EXCHANGES + RECOMPUTED_EXCHANGES * recompute
    exchanges /= 2 if args.attention_transfer else 1  # no FFN
    exposed = EXPOSED_WITH_OVERLAP if args.tp_comm_overlap else 1.0
    context = card.link(tp * cp)
    found: dict[str, dict[str, float]] = {}
    for kind, third in seconds.items():
        parts = {"compute": 3 * third * tokens / tp, "host": 0.0, "tensor": 0.0, "context": 0.0}
        if shape.num_experts:
            parts["experts"] = 0.0
        if kind in LAYERS:
            share = shape.query_share if kind == "cross_decoder" else 1.0
            if args.attention_transfer:
                parts["compute"] -= 3 * _ffn_seconds(shape, kind, card.rates(args)) * tokens / tp
            if _recomputes_mlp(args):
                ffn = 2 * 3 * shape.hidden_size * shape.ffn_hidden_size * (1 - shape.experts_share(kind))
                parts["compute"] += ffn / card.rates(args).linear * share * tokens / tp
            if tp > 1:
                size = tokens * share * shape.hidden_size * BYTES * (tp - 1) / tp * (FP8_EXCHANGES if args.fp8 else 1)
                link = card.link(tp)
                each = size / link.bytes_per_second + link.latency * math.log2(tp)
                parts["tensor"] = exchanges * exposed * each
            if cp > 1:
                received = _received_by_layer(args, shape, kind, recompute)
                parts["context"] = context.seconds(received / tp) + 5 * context.latency
            launches = 1.0
            if shape.experts_share(kind):
                again = RECOMPUTE_FACTOR if recompute else 1
                parts["compute"] += 3 * again * _small_products(args, shape, kind, card.rates(args))
                link = card.link(args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tp))
                if received := routed_bytes(args, shape, kind, 3 if recompute else 2):
                    parts["experts"] = link.seconds(received) + (6 if recompute else 4) * link.latency
                launches += shape.experts_share(kind) * _launches_of_experts(args, shape)
            parts["host"] = launches * card.launch(args) * (RECOMPUTE_FACTOR if recompute else 1)
        elif kind == "mtp":  # layers of the cross-decoder, of which it has the products already
            of_mtp = shape.of_mtp
            of_layer = (found if of_mtp is shape else _layers(args, of_mtp, card, recompute))["cross_decoder"]
            parts |= {part: shape.mtp_num_layers * of_layer[part] for part in ("host", "tensor", "context")}
        elif args.attention_transfer:
            parts["compute"] = 0.0
        found[kind] = parts
    return found


def _ffn_seconds(shape: ModelShape, kind: str, rates: Rates) -> float:
    """Of a token, forward, in a layer of attention transfer, which leaves them out."""
    weights = layer_matmul_parameters(shape, active=True)[kind] - attention_parameters(shape)[kind]
    return 2 * weights / rates.linear + rates.elementwise * shape.ffn_width(kind)


def _small_products(args: Namespace, shape: ModelShape, kind: str, rates: Rates) -> float:
    """Seconds of a micro-batch, forward, that products of few rows take longer than large ones, in a layer in the mean.

    An expert has the tokens that its ranks send it, as many as any other.
    """
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    share = shape.query_share if kind == "cross_decoder" else 1.0
    tokens = args.micro_batch_size * args.seq_length * share / (args.context_parallel_size * tp)
    experts = (shape.num_experts or 1) / ep
    rows = tokens * shape.moe_router_topk * etp / experts
    flops = 2 * 3 * shape.hidden_size * (shape.moe_ffn_hidden_size or 0) / etp * rows * experts
    return shape.experts_share(kind) * flops / rates.linear * HALF_RATE_ROWS / rows


def _launches_of_experts(args: Namespace, shape: ModelShape) -> float:
    """As a share of those of a layer."""
    if args.moe_grouped_gemm:
        return LAUNCHES_OF_A_GROUP
    return LAUNCHES_OF_AN_EXPERT * (shape.num_experts or 0) / args.expert_model_parallel_size


def _teacher_seconds(args: Namespace, shape: ModelShape, teacher: ModelShape, card: Card, stage: Parts) -> float:
    """Of a micro-batch in the forward pass of what stands beside a stage of the student."""
    changed: dict[str, Any] = {
        "architecture": "transformer",
        "fp8": None,
        "recompute_elementwise": False,
        "attention_transfer": False,
    }
    changed |= {"recompute_granularity": None, "mlp_chunks_for_training": 1}
    layers = _layers(Namespace(**vars(args) | changed), teacher, card, False)
    forward = {
        kind: max(parts["compute"] / 3 + parts["tensor"] * FORWARD_EXCHANGES + parts["context"] / 3, parts["host"] / 3)
        for kind, parts in layers.items()
    }
    logits = 1 - 1 / loss_chunks(args, teacher)  # those made again in backward, of three passes and of one
    head = 0.0 if args.attention_transfer else forward["output_layer"] * (1 + logits) / (1 + logits / 3)
    forward["output_layer"] = head
    return sum(count * forward[kind] for kind, count in teacher_parts(stage, shape, teacher).items())


def _stage(
    args: Namespace, shape: ModelShape, card: Card, stage: Parts, kv_sets: int, layers: Layers, source: int | None
) -> dict[str, float]:
    """Seconds of a micro-batch by part; the stage reads so many sets of K,V; `source`: of `memory_sources`."""
    total = dict.fromkeys(("compute", "host", "tensor", "context", *(("experts",) if shape.num_experts else ())), 0.0)
    ends = 0.0
    for kind, count in stage.items():
        again = recomputed_layers(args, kind, count, source) if kind in (*LAYERS, "mtp") else 0
        for recompute, number in ((False, count - again), (True, again)):
            if number:
                for part, seconds in layers[recompute][kind].items():
                    total[part] += number * seconds
        if kind not in (*LAYERS, "mtp"):
            ends += count * layers[False][kind]["compute"]
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    if cp > 1 and kv_sets and travelling(args, shape) == "keys":
        each = cross_attention_bytes_of_run(args, shape)["keys"] / shape.shared_kv_sets
        total["context"] += kv_sets * card.link(tp * cp).seconds(each / tp)
    if args.pipeline_model_parallel_size > 1:
        total["host"] += card.launch_chunk_ms * 1e-3
        ends = 0.0
    # The host runs ahead of the GPU, in a pipeline through the head, too, and decides where all launches take longer.
    launches = 0.0 if args.cuda_graph_impl == "full_iteration" else total.pop("host")
    return total | {"host": max(0.0, launches - (sum(total.values()) - ends))}


def _recomputes_mlp(args: Namespace) -> bool:
    """Once more than --recompute-granularity full says, where in parts (--mlp-chunks-for-training)."""
    if args.mlp_chunks_for_training > 1:
        return True
    return args.recompute_granularity == "selective" and "mlp" in (args.recompute_modules or [])


def _received_by_layer(args: Namespace, shape: ModelShape, kind: str, recompute: bool) -> float:
    """Bytes that context parallelism sends for one layer and micro-batch, before tensor parallelism."""
    cp, passes = args.context_parallel_size, 2 if recompute else 1
    if kind == "self_decoder":
        return shape.mean(lambda mixer: mixer.received_bytes(shape, cp, args.micro_batch_size, BYTES, passes))
    if kind == "decoder":
        kv = (cp - 1) / cp * args.seq_length * args.micro_batch_size * shape.kv_width * BYTES
        return EXPOSED_RING * kv * (passes + 2)
    if travelling(args, shape) == "keys":
        return 0.0
    each = cross_attention_bytes_of_run(args, shape)["queries"] / attention_layers(shape)
    return each * shape.attention_share
