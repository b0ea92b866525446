"""From Megatron's pipeline flags to one layout string, the only form that the rest of YOCO reads.

However a user asks for stages (a layout, an even number of layers per virtual stage, uneven ends, or nothing but a
number of ranks), the answer is `--pipeline-model-parallel-layout`; where nothing else is said, the planner cuts.
"""

from argparse import Namespace
from itertools import pairwise

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from yoco_megatron.config.kv_sets import sources_of
from yoco_megatron.config.resolve import queries_vary
from yoco_megatron.config.rules import check_stages
from yoco_megatron.costs.memory import data_parallel_size
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.stage_time import part_seconds_of_run
from yoco_megatron.parallel.pipeline import planner
from yoco_megatron.parallel.pipeline.stages import StagePlan, layout_string
from yoco_megatron.utils.errors import require


def plan_stages(args: Namespace, shape: ModelShape) -> StagePlan | None:
    """The stages that the flags ask for; None without pipeline parallelism.

    Raises:
        ValueError: layers that do not add up, flags that contradict each other, more stages than layers.
    """
    ranks = args.pipeline_model_parallel_size
    check_stages(args)
    if ranks == 1:
        return None
    split_layer = shape.num_self_decoder_layers
    if args.pipeline_model_parallel_layout is not None:
        counts = _parse(args.pipeline_model_parallel_layout, shape, ranks)
    elif args.num_layers_per_virtual_pipeline_stage is not None:
        counts = _even(shape.num_layers, args.num_layers_per_virtual_pipeline_stage, ranks)
    elif args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers:
        counts = _uneven_ends(args, shape.num_layers, ranks)
    else:
        chunks = args.num_virtual_stages_per_pipeline_rank or 1
        seconds = part_seconds_of_run(shape, args)
        counts = planner.plan_cuts(shape.num_layers, split_layer, ranks, chunks, seconds, sources_of(shape))
    plan = StagePlan.of(shape, counts)
    some = shape.num_queries is not None or (getattr(args, "has_loss_masks", False) and queries_vary(args))
    require(
        counts[-1] > 0 or shape.mtp_num_layers > 0 or not some,
        f"stages '{layout_string(counts)}' have the head alone on the last one, which does not go with a loss at some "
        "positions: give it a layer by --pipeline-model-parallel-layout, or set --cross-decoder-positions all",
    )
    behind = [g for g in range(plan.count) if plan.stage(g).is_behind(split_layer)]
    require(
        not (some and shape.cross_decoder_pattern) or all(map(plan.kv_arriving, behind)),
        f"stages '{layout_string(counts)}' have gated memory units alone at the end of --cross-decoder-pattern "
        f"{shape.cross_decoder_pattern}, which does not go with a loss at some positions: give the last stage a layer "
        "that attends by --pipeline-model-parallel-layout, or set --cross-decoder-positions all",
    )
    return plan


def set_layout(args: Namespace, plan: StagePlan) -> None:
    """Say `plan` in `args.pipeline_model_parallel_layout`, and clear the flags that it replaces."""
    if args.pipeline_model_parallel_layout is None or plan.mtp_layers:
        counts = [last - first for first, last in pairwise(plan.cuts)]
        args.pipeline_model_parallel_layout = layout_string(counts, plan.mtp_layers)
    args.num_layers_per_virtual_pipeline_stage = args.num_virtual_stages_per_pipeline_rank = None
    args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None


def sequences_at_a_time(args: Namespace) -> int:
    """One micro-batch on each data-parallel rank."""
    return args.micro_batch_size * data_parallel_size(args)


def check_micro_batches(args: Namespace, stages: int) -> None:
    """Interleaved schedules take micro-batches in groups (megatron/core/pipeline_parallel/schedules.py).

    Raises:
        ValueError: a batch that does not make whole groups.
    """
    ranks = args.pipeline_model_parallel_size
    if args.global_batch_size is None or stages == ranks:
        return
    each = sequences_at_a_time(args)
    micro_batches = args.global_batch_size // each
    group = args.microbatch_group_size_per_vp_stage or ranks
    rest = micro_batches % group
    require(
        micro_batches >= group and (rest == 0 or rest >= ranks),
        f"--global-batch-size {args.global_batch_size} gives a pipeline {micro_batches} micro-batches, which virtual "
        f"stages take {group} at a time: make it a multiple of --micro-batch-size {args.micro_batch_size} x "
        f"{each // args.micro_batch_size} data-parallel ranks x {group} = {each * group}",
    )


def _parse(layout: str, shape: ModelShape, ranks: int) -> list[int]:
    flag = f"--pipeline-model-parallel-layout '{layout}'"
    try:
        rows = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError as error:
        raise ValueError(f"{flag}: {error}") from None
    flat = [kind for row in rows for kind in row]
    require(
        flat[:1] == [LayerType.embedding]
        and flat[-1:] == [LayerType.loss]
        and flat.count(LayerType.embedding) == flat.count(LayerType.loss) == 1,
        f"{flag}: must begin with the embedding E and end with the loss L, each once, for example 'Ett|ttL'",
    )
    mtp = flat.count(LayerType.mtp)
    require(
        mtp == 0 or (mtp == shape.mtp_num_layers and rows[-1].count(LayerType.mtp) == mtp),
        f"{flag}: its layers of multi-token prediction (m) must be those of --mtp-num-layers {shape.mtp_num_layers}, "
        "in the last stage; they need not be written",
    )
    layers = flat.count(LayerType.decoder)
    require(
        layers == shape.num_layers,
        f"{flag}: its {layers} layers (t) do not add up to --num-layers {shape.num_layers}",
    )
    require(
        len(rows) % ranks == 0,
        f"{flag}: its {len(rows)} stages are not a multiple of --pipeline-model-parallel-size {ranks}",
    )
    empty = [index for index, row in enumerate(rows) if not row]
    require(not empty, f"{flag}: stage {empty and empty[0]} is empty, give every stage a layer, E or L")
    return [row.count(LayerType.decoder) for row in rows]


def _even(num_layers: int, per_stage: int, ranks: int) -> list[int]:
    require(
        num_layers % (per_stage * ranks) == 0,
        f"--num-layers {num_layers} is not a multiple of --num-layers-per-virtual-pipeline-stage {per_stage} x "
        f"--pipeline-model-parallel-size {ranks}: change one of them, or use --num-virtual-stages-per-pipeline-rank",
    )
    return [per_stage] * (num_layers // per_stage)


def _uneven_ends(args: Namespace, num_layers: int, ranks: int) -> list[int]:
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    middle = ranks - (first is not None) - (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    require(
        left >= 0 and (left % middle == 0 if middle else left == 0),
        f"--decoder-first-pipeline-num-layers {first} and --decoder-last-pipeline-num-layers {last} leave {left} "
        f"layers for {middle} stages, which does not divide: remove both, and the planner chooses",
    )
    ends = ([first] if first is not None else [], [last] if last is not None else [])
    return [*ends[0], *[left // middle] * middle, *ends[1]] if middle else [*ends[0], *ends[1]]
