"""`Plan`: one way to run a model on so many GPUs, with its memory and its step."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

from yoco_megatron.config import run_rules
from yoco_megatron.config.kv_sets import sources_of
from yoco_megatron.config.rules import check_stages
from yoco_megatron.costs.card import Card
from yoco_megatron.costs.memory import (
    GIB,
    Memory,
    data_parallel_size,
    even_stages,
    fullest_memory,
    num_microbatches,
    rank_memories,
)
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import Parts, part_seconds_of_run
from yoco_megatron.costs.step_time import StepTime, mfu, step_time
from yoco_megatron.costs.teacher import check_mesh as check_teacher
from yoco_megatron.parallel.pipeline.planner import filled_cuts, layer_seconds, plan_cuts
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.planning.flags import build_parser
from yoco_megatron.utils.errors import require

# Share of a GPU's memory that a plan may fill: the rest is for CUDA, NCCL, fragments and what the formulas leave out.
# Runs whose peak was 95.9% of an H100 have ended well.
FILL = 0.94


@dataclass(frozen=True)
class Plan:
    """Flags, and the stages that they give."""

    args: Namespace
    shape: ModelShape
    card: Card
    stages: Sequence[Parts]
    roughly: bool = False
    """Its time without following the pipeline's schedule, for thousands of plans."""

    @classmethod
    def of(cls, args: Namespace, card: Card) -> "Plan":
        """With the stages of the run itself. Raises ValueError for flags that make no mesh."""
        shape = ModelShape.from_args(args)
        run_rules.check(args, build_parser())
        check_teacher(args, shape)
        if args.architecture == "yoco":
            check_stages(args)
        ranks, microbatches = args.pipeline_model_parallel_size, num_microbatches(args) or 1
        require(
            (args.num_virtual_stages_per_pipeline_rank or 1) == 1 or microbatches % ranks == 0,
            f"virtual stages take micro-batches {ranks} at a time, and there are {microbatches}: change "
            "--global-batch-size, --micro-batch-size or --pipeline-model-parallel-size",
        )
        return cls(args, shape, card, stages_of(args, shape))

    @cached_property
    def memories(self) -> list[Memory]:
        """Of each pipeline rank."""
        return rank_memories(self.args, self.shape, self.stages)

    @cached_property
    def memory(self) -> Memory:
        """Of the fullest."""
        return fullest_memory(self.args, self.shape, self.stages)

    @property
    def fits(self) -> bool:
        """The memory of its GPUs."""
        return self.memory.total <= FILL * self.card.memory_gib * GIB

    @cached_property
    def time(self) -> StepTime:
        """Of a step."""
        return step_time(self.args, self.shape, self.stages, self.card, by_schedule=not self.roughly)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.args.global_batch_size * self.args.seq_length / self.time.seconds

    @property
    def mfu(self) -> float:
        """By the card's data sheet."""
        return mfu(self.args, self.shape, self.card, self.time.seconds)

    @property
    def mesh(self) -> str:
        """TP2 PP4 VP2 CP1 DP8 without the ones."""
        sizes = {
            "TP": self.args.tensor_model_parallel_size,
            "PP": self.args.pipeline_model_parallel_size,
            "VP": len(self.stages) // self.args.pipeline_model_parallel_size,
            "CP": self.args.context_parallel_size,
            "EP": self.args.expert_model_parallel_size,
            "DP": data_parallel_size(self.args),
        }
        names = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        etp = self.args.expert_tensor_parallel_size
        if etp not in (None, self.args.tensor_model_parallel_size):
            names.append(f"ETP{etp}")
        return " ".join(names) or "one GPU"

    @property
    def crosses_nodes(self) -> bool:
        """Whether context parallelism does."""
        span = self.args.tensor_model_parallel_size * self.args.context_parallel_size
        return self.args.context_parallel_size > 1 and span > self.card.gpus_per_node

    @property
    def recompute(self) -> str:
        """What backward recomputes, in a word."""
        if self.args.recompute_granularity == "full":
            block = self.args.recompute_method == "block"
            layers = f"block of {self.args.recompute_num_layers}" if block else "full"
            return f"{layers}, attention kept" if self.args.keep_cross_attention else layers
        if self.args.recompute_granularity == "selective":
            return " ".join(self.args.recompute_modules or ["core_attn"])
        return "elementwise" if self.args.recompute_elementwise else "none"

    @property
    def microbatches(self) -> int:
        """Of a step on each replica."""
        return num_microbatches(self.args) or 1


def stages_of(args: Namespace, shape: ModelShape) -> list[Parts]:
    """The stages that the flags ask for, as the run itself would cut them.

    Raises:
        ValueError: more stages than layers, or a layout by hand that does not fit.
    """
    ranks = args.pipeline_model_parallel_size
    for dest in ("num_layers_per_virtual_pipeline_stage", "decoder_first_pipeline_num_layers"):
        flag = f"--{dest.replace('_', '-')}"
        require(getattr(args, dest) is None, f"{flag} is not read here: give --pipeline-model-parallel-layout instead")
    if ranks == 1 or shape.architecture == "transformer":
        return list(even_stages(args, shape))
    if args.pipeline_model_parallel_layout:
        counts = _counts(args.pipeline_model_parallel_layout, shape.num_layers, ranks)
    else:
        chunks = args.num_virtual_stages_per_pipeline_rank or 1
        seconds = part_seconds_of_run(shape, args)
        split_layer, sources = shape.num_self_decoder_layers, sources_of(shape)
        counts = plan_cuts(shape.num_layers, split_layer, ranks, chunks, seconds, sources)
    return list(StagePlan.of(shape, counts).parts())


def _counts(layout: str, num_layers: int, ranks: int) -> list[int]:
    """Layers of each stage of 'Ett|tttL'."""
    counts = [stage.count("t") for stage in layout.split("|")]
    require(
        set(layout) <= set("Et|mL") and sum(counts) == num_layers and len(counts) % ranks == 0,
        f"--pipeline-model-parallel-layout '{layout}': write stages of t, a multiple of {ranks} of them with "
        f"{num_layers} t in all, for example 'Ett|tttL'",
    )
    return counts


def nearly_best_stages(args: Namespace, shape: ModelShape) -> list[Parts]:
    """Stages for thousands of meshes: the planner takes a hundred times as long, and balances ranks, too.

    Raises:
        ValueError: more stages than layers.
    """
    count = args.pipeline_model_parallel_size * (args.num_virtual_stages_per_pipeline_rank or 1)
    seconds = part_seconds_of_run(shape, args)
    # Few ratios occur, so that most meshes find their cuts made.
    ratios = (
        round(seconds[part] / seconds["cross_decoder"], 2) for part in ("self_decoder", "shared_kv", "output_layer")
    )
    mtp = round(seconds.get("mtp", 0.0) / seconds["cross_decoder"], 2)
    return _filled_stages(
        shape.num_layers, sources_of(shape), shape.num_self_decoder_layers, count, *ratios, mtp, shape.mtp_num_layers
    )


@cache
def _filled_stages(
    num_layers: int,
    kv_sources: tuple[int, ...],
    split_layer: int,
    stages: int,
    self_decoder: float,
    shared_kv: float,
    output_layer: float,
    mtp: float,
    mtp_layers: int,
) -> list[Parts]:
    """Costs are relative to a layer of the cross-decoder."""
    require(stages <= num_layers, f"{stages} stages are more than --num-layers {num_layers}")
    seconds = {"embedding": 0.0, "self_decoder": self_decoder, "shared_kv": shared_kv}
    seconds |= {"cross_decoder": 1.0, "output_layer": output_layer, "mtp": mtp}
    counts = filled_cuts(layer_seconds(num_layers, split_layer, seconds, kv_sources), stages)
    plan = StagePlan((0, *accumulate(counts)), split_layer, mtp_layers=mtp_layers, kv_sources=kv_sources)
    return list(plan.parts())
