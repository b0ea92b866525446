"""What tools/plan.py prints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yoco_megatron.costs.memory import GIB
from yoco_megatron.costs.shape import parameter_count
from yoco_megatron.costs.stage_time import held_parameters
from yoco_megatron.planning.mesh import FILL, Plan
from yoco_megatron.planning.run import DAY, RunPlan, Site, restart_budget
from yoco_megatron.planning.search import ERROR, Found
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.text_table import aligned

SENT = ("tensor", "context", "pipeline", "data")
GOODPUTS = (0.90, 0.95, 0.98)  # for which a run's restart budget is told
NOT_MEASURED = "context parallelism over nodes, which no run of ours has measured"


def model_line(plan: Plan) -> str:
    """What is trained."""
    args, parameters = plan.args, sum(parameter_count(plan.shape).values())
    batch = args.global_batch_size * args.seq_length
    positions = "" if plan.shape.num_queries is None else f", loss on the last {plan.shape.num_queries:,}"
    return (
        f"{parameters / 1e9:.2f}B parameters, {args.seq_length:,} tokens a sequence{positions}, "
        f"{args.global_batch_size:,} sequences a step ({batch / 1e6:.2f}M tokens), {args.world_size:,} {plan.card.name}"
    )


def search_report(found: Found, settings: dict[str, Any], top: int) -> str:
    """The plans, why others are none, and the flags of the best."""
    best = found.best
    shown = [best, *[plan for plan in found.plans if plan is not best][: top - 1]]
    sent = (*SENT, "experts") if best.shape.num_experts else SENT
    heads = ("mesh", "micro-batch", "recompute", "GiB", "step s", "tokens/s/GPU", "MFU", "bubble", *sent)
    rows = [
        (
            plan.mesh + (" *" if plan.crosses_nodes else ""),
            str(plan.args.micro_batch_size),
            plan.recompute + (" fp8" if plan.args.fp8 else ""),
            f"{plan.memory.total / GIB:.1f}",
            f"{plan.time.seconds:.3g}",
            f"{plan.tokens_per_second / plan.args.world_size:,.0f}",
            f"{plan.mfu:.1%}",
            *(f"{plan.time.share(part):.1%}" for part in ("bubble", *sent)),
        )
        for plan in shown
    ]
    discarded = [(reason, f"{count:,}") for reason, count in found.discarded.most_common()]
    lines = [
        model_line(best),
        "",
        aligned([heads, *rows]),
        "",
        f"First the simplest of {len(found.equal)} within {ERROR:.0%} of the fastest, which the model cannot tell "
        "apart; then by speed.",
        f"GiB of {best.card.memory_gib:.1f}, of which a plan fills {FILL:.0%} at most; {', '.join(sent)}: "
        "communication that nothing hides.",
    ]
    if best.shape.num_experts:
        lines.append("Speed and exchange of experts are assumed: no run with experts has been measured.")
    if any(plan.crosses_nodes for plan in shown):
        lines.append(f"* {NOT_MEASURED}")
    lines += ["", aligned([("discarded", "meshes"), *discarded])] if discarded else []
    lines += ["", f"{len(found.plans):,} fit. Flags of the first:", "", "  " + command_line(settings)]
    unset = [name for name, value in settings.items() if value is None]
    if unset:
        lines.append(f"  and without what the configs say of {', '.join(unset)} (--output writes it so)")
    return "\n".join(lines)


def command_line(settings: dict[str, Any]) -> str:
    """To paste."""
    words = []
    for name, value in settings.items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return " ".join(words)


def explain_report(plan: Plan) -> str:
    """Where the bytes of each rank and the milliseconds of a step go."""
    args = plan.args
    pp = args.pipeline_model_parallel_size
    lines = [model_line(plan), f"{plan.mesh}, {plan.microbatches} micro-batches of {args.micro_batch_size}", ""]
    names = list(dict.fromkeys(name for memory in plan.memories for name in memory.parts))
    rows = [
        (
            str(rank),
            *(f"{memory.parts.get(name, 0.0) / GIB:.2f}" for name in names),
            f"{memory.total / GIB:.2f}",
        )
        for rank, memory in enumerate(plan.memories)
    ]
    lines += [f"GiB of a GPU's {plan.card.memory_gib:.1f}, by pipeline rank:"]
    lines += [aligned([("rank", *names, "all"), *rows]), ""]
    parts = list(plan.time.stages[0])
    stages = [
        (
            str(stage.get("self_decoder", stage.get("decoder", 0))),
            str(stage.get("cross_decoder", 0)),
            _ends(stage),
            f"{sum(held_parameters(args, plan.shape, stage)) / 1e6:,.0f}",
            *(f"{seconds[part] * 1e3:.2f}" for part in parts),
            f"{sum(seconds.values()) * 1e3:.2f}",
        )
        for stage, seconds in zip(plan.stages, plan.time.stages)
    ]
    lines += [f"Milliseconds of a micro-batch, forward and backward, by stage (stage g is on rank g % {pp}):"]
    heads = ("stage", "self", "cross", "also", "M parameters a GPU", *parts, "all")
    lines += [aligned([heads, *_merged(stages)]), ""]
    step = plan.time
    shares = [(part, f"{seconds * 1e3:,.1f}", f"{step.share(part):.1%}") for part, seconds in step.parts.items()]
    lines += [aligned([("a step, slowest rank", "ms", "share"), *shares, ("all", f"{step.seconds * 1e3:,.1f}", "")])]
    speed = plan.tokens_per_second / args.world_size
    lines += ["", f"{speed:,.0f} tokens/s/GPU, MFU {plan.mfu:.1%}"]
    if not plan.fits:
        lines.append(
            f"WARNING: {plan.memory.total / GIB:.1f} GiB is above {FILL:.0%} of {plan.card.memory_gib:.1f}: too large"
        )
    if plan.crosses_nodes:
        lines.append(f"WARNING: {NOT_MEASURED}")
    return "\n".join(lines)


def run_report(plan: Plan, run: RunPlan, site: Site, tokens: int, corpus: int | None) -> str:
    """The run's plan."""
    args = plan.args
    lines = [
        model_line(plan),
        f"{plan.mesh}, {plan.memory.total / GIB:.1f} GiB a GPU, {plan.time.seconds:.3g} s a step, MFU {plan.mfu:.1%}",
        "",
    ]
    rows = [
        ("FLOPs", f"{run.flops:.3g}"),
        ("steps", f"{run.steps:,}"),
        ("days without failures", f"{run.compute / DAY:.1f}"),
        ("days", f"{run.seconds / DAY:.1f}"),
        ("GPU-hours", f"{run.gpu_hours:,.0f}"),
        ("energy, MWh", f"{run.megawatt_hours:,.0f}"),
        ("hours between failures", f"{run.mean_time_between_failures / 3600:.1f}"),
        ("failures", f"{run.failures:.0f}"),
        ("save every, minutes", f"{run.save_every / 60:.1f}"),
        ("--save-interval", f"{run.steps_between_saves:,}"),
        ("a checkpoint, GB", f"{run.checkpoint_bytes / 1e9:,.0f}"),
        ("goodput", f"{run.goodput:.1%}"),
        ("lost to saves", f"{site.save_stall / run.save_every:.1%}"),
        ("lost work", f"{run.save_every / 2 / run.mean_time_between_failures:.1%}"),
        ("lost to restarts", f"{site.restart / run.mean_time_between_failures:.1%}"),
        *(
            (f"restart budget for {wanted:.0%}, seconds", f"{budget:,.0f}" if budget > 0 else "none: save faster")
            for wanted in GOODPUTS
            for budget in [restart_budget(run.mean_time_between_failures, site.save_stall, wanted)]
        ),
        ("data, TB at 4 bytes a token", f"{tokens * 4 / 1e12:,.1f}"),
    ]
    if corpus:
        rows.append(("epochs of the corpus", f"{tokens / corpus:.2f}"))
    lines.append(aligned([("of the run", ""), *rows]))
    for dest in ("train_iters", "lr_decay_iters"):
        value = getattr(args, dest)
        if value is not None and abs(value / run.steps - 1) > 0.01:
            flag = f"--{dest.replace('_', '-')}"
            lines.append(f"WARNING: {flag} {value:,} is not the {run.steps:,} steps of these tokens")
    if args.lr_warmup_iters > run.steps / 10:
        lines.append(f"WARNING: --lr-warmup-iters {args.lr_warmup_iters:,} is more than a tenth of {run.steps:,} steps")
    return "\n".join(lines)


def picture(plan: Plan, path: str) -> None:
    """Bars of `explain_report`, written to `path`. Raises ValueError without matplotlib or a file's ending."""
    require(Path(path).suffix != "", f"--picture {path} has no ending: name a .png or .svg")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install matplotlib, or leave it out") from None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    _bars(left, [{name: size / GIB for name, size in memory.parts.items()} for memory in plan.memories])
    left.axhline(plan.card.memory_gib, color="black", linestyle="--")
    left.set(xlabel="pipeline rank", ylabel="GiB of a GPU", title="memory")
    _bars(right, [{part: value * 1e3 for part, value in stage.items()} for stage in plan.time.stages])
    right.set(xlabel="stage", ylabel="ms of a micro-batch", title=f"time ({plan.mesh})")
    figure.tight_layout()
    figure.savefig(path)


def _bars(axes: Any, columns: Sequence[dict[str, float]]) -> None:
    """Stacked."""
    floor = [0.0] * len(columns)
    for name in dict.fromkeys(name for column in columns for name in column):
        heights = [column.get(name, 0.0) for column in columns]
        axes.bar(range(len(columns)), heights, bottom=floor, label=name)
        floor = [low + height for low, height in zip(floor, heights)]
    axes.legend(fontsize=7)


def _merged(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """With the numbers of each row, or of as many neighbours as are equal, before it."""
    merged = []
    for first, row in enumerate(rows):
        if first and row == rows[first - 1]:
            continue
        last = next((stop for stop in range(first + 1, len(rows)) if rows[stop] != row), len(rows)) - 1
        merged.append((str(first) if last == first else f"{first}-{last}", *row))
    return merged


def _ends(stage: Any) -> str:
    names = {"embedding": "embed", "shared_kv": "K,V", "mtp": "MTP", "output_layer": "head"}
    return " ".join(name for part, name in names.items() if stage.get(part))
