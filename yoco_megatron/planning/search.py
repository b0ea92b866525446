"""The best mesh for so many GPUs: all by the formulas of `costs`, the fastest cut once more as the run would be."""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from yoco_megatron.costs.card import Card
from yoco_megatron.costs.memory import GIB, data_parallel_size, num_microbatches
from yoco_megatron.costs.shape import ModelShape, parameter_count, routed_parameters
from yoco_megatron.costs.teacher import divides, teacher_shape
from yoco_megatron.mixers import mixers_in
from yoco_megatron.planning.flags import set_padded_vocab_size
from yoco_megatron.planning.mesh import FILL, Plan, nearly_best_stages
from yoco_megatron.utils.errors import require

# A little more than the median error of the step's time on measured rows (tests/costs/test_measured.py): plans nearer
# than that are equal.
ERROR = 0.04
FINALISTS = 8  # cut again by the planner, which takes a tenth of a second each
SIZES = (1, 2, 4, 8, 16, 32, 64)
NO_RECOMPUTE = {
    "recompute_activations": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": None,
    "recompute_elementwise": False,
    "keep_cross_attention": False,
}
FULL = NO_RECOMPUTE | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
ELEMENTWISE = NO_RECOMPUTE | {"recompute_elementwise": True}
SELECTIVE = NO_RECOMPUTE | {"recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]}
# What a search decides: fields of the flags, whichever the configs name.
DECIDED = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_size": 1,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "micro_batch_size": None,
    "use_distributed_optimizer": False,
    "use_precision_aware_optimizer": False,
} | NO_RECOMPUTE
FLAGS = {"fp8": "fp8-format"}
# Why a mesh is none, in the order of the checks, and what would help.
FIXES = {
    "GPUs do not divide": "use a number of GPUs that is a multiple of the mesh",
    "virtual stages without a pipeline": "remove --num-virtual-stages-per-pipeline-rank",
    "tensor parallelism over nodes": "use a smaller --tensor-model-parallel-size",
    "heads or widths do not divide": "use a smaller --tensor-model-parallel-size",
    "stages hold the same layers of teacher and student": "train without a pipeline, on more GPUs if states do not fit",
    "experts do not divide": "use a smaller --expert-model-parallel-size",
    "sequence does not divide": "use another --seq-length",
    "batch does not divide": "use another --global-batch-size, or another number of GPUs",
    "more stages than layers": "use fewer stages",
    "micro-batches are no multiple of the pipeline": "use another --global-batch-size, or another number of GPUs",
    "states do not fit": "use more GPUs",
    "activations do not fit": "use more GPUs, or a shorter --seq-length",
}


@dataclass(frozen=True)
class Found:
    """Plans from the fastest; why the others were discarded, and how many."""

    plans: list[Plan]
    discarded: Counter[str]

    @property
    def equal(self) -> list[Plan]:
        """Those that the model cannot tell from the fastest."""
        limit = self.plans[0].time.seconds * (1 + ERROR)
        return [plan for plan in self.plans if plan.time.seconds <= limit]

    @property
    def best(self) -> Plan:
        """The simplest of these."""
        return min(self.equal, key=_complexity)


def search(args: Namespace, own: dict[str, Any], card: Card, precisions: tuple[str, ...] = ()) -> Found:
    """All meshes of `args.world_size` GPUs for the model, lengths and batch of `args`.

    Args:
        own: fields that the user set on the command line, which hold; see `flags.parse`.
        precisions: of bf16 and fp8, those to try; by default what `args` say.
    Raises:
        ValueError: none fits; the text has the reasons.
    """
    require(args.architecture == "yoco", "the search is for --architecture yoco, whose pipeline the planner cuts")
    by_hand = "pipeline_model_parallel_layout" in own
    require(not by_hand, "--pipeline-model-parallel-layout: the search cuts pipelines itself; remove it, or explain")
    held = "fp8" in own and "bf16" in precisions
    require(not held, "--fp8-format does not go with --precisions bf16: use only one")
    discarded: Counter[str] = Counter()
    plans: list[Plan] = []
    shape = ModelShape.from_args(args)
    in_fp8 = args.fp8 or "fp8" in precisions
    require(not (shape.num_experts and in_fp8), "--fp8-format is not built for --num-experts: remove one of them")
    for mesh in _meshes(args, own):
        reason = _breaks(mesh, shape, card)
        if reason:
            discarded[reason] += 1
            continue
        for with_precision in _precisions(mesh, precisions):
            of_mesh = replace(shape, padded_vocab_size=mesh.padded_vocab_size)
            plan = _with_least_recompute(with_precision, own, of_mesh, card, discarded)
            if plan is not None:
                plans.append(plan)
    if not plans:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in discarded.most_common())
        fix = [FIXES[reason] for reason in FIXES if reason in discarded][-1]  # of those that came furthest
        raise ValueError(f"no mesh for {args.world_size} GPUs ({reasons}): {fix}")
    plans.sort(key=lambda plan: plan.time.seconds)
    # The search's cuts are a little worse than the planner's, for some meshes more than for others.
    finalists = [Plan.of(plan.args, card) for plan in plans[:FINALISTS]]
    fits = [plan for plan in finalists if plan.fits] or finalists
    return Found(sorted([*fits, *plans[FINALISTS:]], key=lambda plan: plan.time.seconds), discarded)


def settings(plan: Plan, base: Namespace) -> dict[str, Any]:
    """The flags of a plan, as a config has them; null for one of `base` that the plan does not have."""
    found: dict[str, Any] = {}
    for dest, default in (DECIDED | {"fp8": None}).items():
        value = getattr(plan.args, dest)
        if value != default or getattr(base, dest) != value:
            found[FLAGS.get(dest, dest.replace("_", "-"))] = None if value in (None, False) else value
    return found


def _complexity(plan: Plan) -> tuple[int, ...]:
    """What no run has measured, kinds of parallelism, recompute, then their sizes."""
    args = plan.args
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    kinds = sum(size > 1 for size in (*sizes, len(plan.stages) // sizes[1], args.expert_model_parallel_size))
    kinds += args.expert_tensor_parallel_size not in (None, sizes[0])
    recompute = {None: int(args.recompute_elementwise), "selective": 2, "full": 3}[args.recompute_granularity]
    product_of_sizes, chunks = sizes[0] * sizes[1] * sizes[2], len(plan.stages) // sizes[1]
    return int(plan.crosses_nodes), kinds, recompute, product_of_sizes, chunks, -args.micro_batch_size


def _meshes(args: Namespace, own: dict[str, Any]) -> Iterator[Namespace]:
    """Every mesh with every micro-batch and number of virtual stages, possible or not."""

    def sizes(dest: str, choices: tuple[Any, ...]) -> tuple[Any, ...]:
        return (own[dest],) if dest in own else choices

    divisors = tuple(
        size for size in range(1, min(args.num_layers, args.world_size) + 1) if args.world_size % size == 0
    )
    for tp, pp, cp, micro_batch, ep, whole in product(
        sizes("tensor_model_parallel_size", SIZES[:4]),
        sizes("pipeline_model_parallel_size", divisors),
        sizes("context_parallel_size", SIZES[:6]),
        sizes("micro_batch_size", SIZES[:4]),
        sizes("expert_model_parallel_size", SIZES if args.num_experts else (1,)),
        (True, False) if args.num_experts else (False,),
    ):
        if args.num_experts and whole == (tp == 1 or "expert_tensor_parallel_size" in own):
            continue  # experts are whole, or as the user says, in any case
        if not whole and tp > 1 and ep < (args.num_experts or 1) and "expert_tensor_parallel_size" not in own:
            continue  # ranks that share an expert send more than those that have other ones
        virtual = (1, 2, 3, 4, 5, 6) if pp > 1 else (1,)
        for chunks in sizes("num_virtual_stages_per_pipeline_rank", virtual):
            mesh = Namespace(**vars(args))
            mesh.tensor_model_parallel_size, mesh.pipeline_model_parallel_size = tp, pp
            mesh.context_parallel_size, mesh.micro_batch_size = cp, micro_batch
            mesh.expert_model_parallel_size = ep
            mesh.expert_tensor_parallel_size = own.get("expert_tensor_parallel_size", 1 if whole else None)
            mesh.num_virtual_stages_per_pipeline_rank = chunks if (chunks or 1) > 1 else None
            mesh.sequence_parallel = tp > 1
            mesh.use_distributed_optimizer = True
            mesh.use_precision_aware_optimizer = own.get(
                "use_precision_aware_optimizer", mesh.optimizer == "adam" and mesh.bf16 and not mesh.fp8_param_gather
            )
            mesh.pipeline_model_parallel_layout = None
            set_padded_vocab_size(mesh)
            yield mesh


def _precisions(mesh: Namespace, precisions: tuple[str, ...]) -> Iterator[Namespace]:
    if not precisions:
        yield mesh
    for precision in precisions:
        yield Namespace(**vars(mesh) | {"fp8": (mesh.fp8 or "hybrid") if precision == "fp8" else None})


def _breaks(mesh: Namespace, shape: ModelShape, card: Card) -> str | None:
    """The first rule that the mesh breaks, in a few words."""
    tp, pp, cp = mesh.tensor_model_parallel_size, mesh.pipeline_model_parallel_size, mesh.context_parallel_size
    if mesh.world_size % (tp * pp * cp):
        return "GPUs do not divide"
    chunks = mesh.num_virtual_stages_per_pipeline_rank or 1
    if chunks > 1 and pp == 1:
        return "virtual stages without a pipeline"
    if tp > card.gpus_per_node:
        return "tensor parallelism over nodes"
    split = (shape.num_attention_heads, shape.num_query_groups, shape.ffn_hidden_size)
    of_mixers = (size for mixer in mixers_in(shape.self_decoder) for size in mixer.divided(shape).values())
    if any(size % tp for size in (*split, *of_mixers)):
        return "heads or widths do not divide"
    ep, etp = mesh.expert_model_parallel_size, mesh.expert_tensor_parallel_size or tp
    widths = (shape.moe_ffn_hidden_size or etp) % etp or (shape.moe_shared_expert_intermediate_size or tp) % tp
    if shape.num_experts and (shape.num_experts % ep or widths or mesh.world_size % (pp * ep * etp)):
        return "experts do not divide"
    teacher = teacher_shape(mesh, shape)
    if teacher and not divides(tp, teacher):
        return "heads or widths do not divide"
    if teacher and pp > 1 and teacher.num_layers != shape.num_layers:
        return "stages hold the same layers of teacher and student"
    if mesh.seq_length % (tp * cp) or (cp > 1 and mesh.seq_length % (2 * cp)):
        return "sequence does not divide"
    if mesh.global_batch_size % (data_parallel_size(mesh) * mesh.micro_batch_size):
        return "batch does not divide"
    if pp * chunks > mesh.num_layers:
        return "more stages than layers"
    if chunks > 1 and (num_microbatches(mesh) or 1) % pp:
        return "micro-batches are no multiple of the pipeline"
    return None


def _with_least_recompute(
    mesh: Namespace, own: dict[str, Any], shape: ModelShape, card: Card, discarded: Counter[str]
) -> Plan | None:
    """None or elementwise where it fits; else the fastest that does."""
    limit = FILL * card.memory_gib * GIB
    sharded = 10 if mesh.use_precision_aware_optimizer else 12 if mesh.optimizer == "adam" else 8
    shards = data_parallel_size(mesh) * mesh.context_parallel_size
    tp, pp = mesh.tensor_model_parallel_size, mesh.pipeline_model_parallel_size
    whole, routed = sum(parameter_count(shape).values()), routed_parameters(shape)
    expert_ranks = mesh.expert_model_parallel_size * (mesh.expert_tensor_parallel_size or tp)
    held = ((whole - routed) / tp + routed / expert_ranks) / pp  # in the mean
    # At least: attention transfer trains few of them.
    states = 2 * held if mesh.attention_transfer else 6 * held + sharded * whole / (tp * pp * shards)
    if states > limit:
        discarded["states do not fit"] += 1
        return None

    def plan_of(recompute: dict[str, Any]) -> Plan:
        args = Namespace(**vars(mesh) | recompute)
        return Plan(args, shape, card, nearly_best_stages(args, shape), roughly=True)

    decided = own.keys() & NO_RECOMPUTE.keys() or mesh.attention_transfer
    plain = (NO_RECOMPUTE,) if mesh.fp8 or shape.num_experts else (NO_RECOMPUTE, ELEMENTWISE)
    for recompute in ({},) if decided else plain:
        plan = plan_of(recompute)
        if plan.fits:
            return plan
    if not decided:
        plans = [plan_of(SELECTIVE), *(_fewest_layers(plan_of, keep) for keep in (True, False))]
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            return min(fitting, key=lambda plan: plan.time.seconds)
        plan = plans[-1]
    discarded["states do not fit" if plan.memory.states > limit else "activations do not fit"] += 1
    return None


def _fewest_layers(plan_of: Callable[[dict[str, Any]], Plan], keep: bool) -> Plan:
    """Full recompute of as few layers of each half of a stage as fit, or of all."""

    def of_first(layers: int) -> Plan:
        return plan_of(
            FULL | {"keep_cross_attention": keep, "recompute_method": "block", "recompute_num_layers": layers}
        )

    every = plan_of(FULL | {"keep_cross_attention": keep})
    if not every.fits:
        return every
    low, high, fewest = 1, max(max(stage.values()) for stage in every.stages), every
    while low < high:  # all of them: `every`
        middle = (low + high) // 2
        plan = of_first(middle)
        if plan.fits:
            high, fewest = middle, plan
        else:
            low = middle + 1
    return fewest
