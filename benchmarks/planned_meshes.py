"""Meshes as `tools/plan.py search` ranks them, measured: is its first nearly the fastest, do its plans fit?

    python benchmarks/preloaded.py benchmarks/planned_meshes.py --gpus 4                    # all parts, eight minutes
    python benchmarks/preloaded.py benchmarks/planned_meshes.py --gpus 4 --only 3b-32768

Parts: of each case the first five plans, and where its sequences are long the first with full recompute; `fit`: the
largest micro-batch that fits by the plan, and one more, which should not, of the 3B on one GPU and on two and of the
13B on four. A run is six steps. Rows have what the plan says as their peer; a ratio above 1: faster, or less memory.
"""

import argparse
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from record import record
from runs import ROOT, Run, attempt, device_name

from yoco_megatron.costs.card import Card
from yoco_megatron.costs.memory import GIB
from yoco_megatron.planning import flags
from yoco_megatron.planning.mesh import Plan
from yoco_megatron.planning.report import command_line
from yoco_megatron.planning.search import FULL, NO_RECOMPUTE, search, settings
from yoco_megatron.utils.text_table import aligned

STEPS, SHORT = 6, 3
LONG = 32768  # tokens from which full recompute is measured, too


@dataclass(frozen=True)
class Case:
    """What is trained."""

    size: str
    length: int
    sequences: int
    """Of a step on four GPUs."""

    @property
    def name(self) -> str:
        return f"{self.size}-{self.length}"

    def flags(self, sequences: int | None = None) -> str:
        return (
            f"--config configs/model/yoco_{self.size}.yaml configs/recipe/scaling.yaml --vocab-size 100350 "
            f"--seq-length {self.length} --max-position-embeddings {self.length} "
            f"--global-batch-size {sequences or self.sequences}"
        )


CASES = (Case("3b", 4096, 32), Case("3b", LONG, 8), Case("13b", 4096, 16))
FITS = ((Case("3b", 4096, 32), 1), (Case("3b", 4096, 32), 2), (Case("13b", 4096, 16), 4))  # and GPUs


def top(case: Case, gpus: int, card: Card, count: int = 5) -> list[tuple[Plan, str]]:
    """The search's first plans with their flags, and the first one's mesh with full recompute for a long case."""
    args, own = flags.parse(case.flags().split(), gpus)
    found = search(args, own, card)
    plans = [found.best, *(plan for plan in found.plans if plan is not found.best)][:count]
    if case.length >= LONG:
        plans.append(Plan.of(Namespace(**vars(found.best.args) | FULL), card))
    return [(plan, f"{case.flags()} {command_line(settings(plan, args))}") for plan in plans]


def largest(case: Case, gpus: int, card: Card) -> tuple[list[tuple[Plan, str]], Plan]:
    """Plans of the largest micro-batch that fits without recompute and of one more, on the search's mesh."""
    args, own = flags.parse(case.flags().split(), gpus)
    mesh = search(args, own | NO_RECOMPUTE, card).best
    of_mesh = settings(mesh, args)
    replicas = mesh.args.world_size // mesh.args.tensor_model_parallel_size // mesh.args.context_parallel_size
    plans: list[tuple[Plan, str]] = []
    micro_batch = 0
    while not plans or plans[-1][0].fits:
        micro_batch += 1
        words = case.flags(2 * micro_batch * replicas)  # a multiple of the pipeline, too
        words += f" {command_line(of_mesh | {'micro-batch-size': micro_batch})}"
        plans.append((Plan.of(flags.parse(words.split(), gpus)[0], card), words))
    return plans[-2:], mesh


def measure(plan: Plan, words: str, name: str, steps: int, options: Namespace) -> Run | None:
    """Its run, recorded beside the plan; None where it fails."""
    gpus = plan.args.world_size
    how = f"{plan.mesh} micro-batch {plan.args.micro_batch_size}, {plan.recompute}"
    case = f"{name} on {gpus}: {how}"
    run = attempt(case, f"{words} --exit-interval {steps} {options.flags}", gpus, options.timeout, verbose=True)
    if not isinstance(run, Run):
        return None
    common = {"benchmark": "planned_meshes", "case": case, "device": options.device, "peer": "tools/plan.py"}
    if steps == STEPS:
        row = {"metric": "time a step", "unit": "ms", "value": round(run.seconds * 1e3, 1)}
        planned = round(plan.time.seconds * 1e3, 1)
        record(options.output, **common, **row, peer_value=planned, higher_is_better=False)
    if run.peak_gib:
        row = {"metric": "peak memory", "unit": "GiB", "value": round(run.peak_gib, 2)}
        planned = round(plan.memory.total / GIB, 2)
        record(options.output, **common, **row, peer_value=planned, higher_is_better=False)
    return run


def line(plan: Plan, run: Run | None) -> tuple[str, ...]:
    """Of the table: planned and measured."""
    planned = plan.time.seconds, plan.memory.total / GIB
    measured = (run.seconds, run.peak_gib or 0.0) if run else (0.0, 0.0)
    cells = [plan.mesh, str(plan.args.micro_batch_size), plan.recompute]
    for expected, found, form in zip(planned, measured, (".3f", ".1f")):
        cells += [f"{expected:{form}}", *((f"{found:{form}}", f"{expected / found - 1:+.1%}") if found else ("-", "-"))]
    return tuple(cells)


HEADS = ("mesh", "micro-batch", "recompute", "plan s", "measured", "off", "plan GiB", "measured", "off")


def ranking(case: Case, card: Card, options: Namespace) -> None:
    """Measure and print one case."""
    runs = [(plan, measure(plan, words, case.name, STEPS, options)) for plan, words in top(case, options.gpus, card)]
    print(f"\n{case.name} on {options.gpus}\n" + aligned([HEADS, *(line(plan, run) for plan, run in runs)]), flush=True)
    full = runs.pop()[1] if case.length >= LONG else None
    seconds = [run.seconds for _, run in runs if run]
    first = runs[0][1]
    if first:
        print(f"the first is {first.seconds / min(seconds) - 1:.1%} above the fastest", flush=True)
    if first and full:
        print(f"and {full.seconds / first.seconds - 1:.1%} faster than with full recompute", flush=True)


def fit(card: Card, options: Namespace) -> None:
    """Measure and print the largest micro-batches."""
    rows = []
    for case, gpus in FITS:
        if gpus > options.gpus:
            continue
        for plan, words in largest(case, gpus, card)[0]:
            run = measure(plan, words, f"{case.name} fit", SHORT, options)
            verdict = "fits" if plan.fits else "does not"
            rows.append((f"{case.name} on {gpus}", *line(plan, run), verdict, "ran" if run else "did not"))
    print("\n" + aligned([("case", *HEADS, "by plan", "run"), *rows]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [case.name for case in CASES] + ["fit"]
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--card", default="h100", help="as tools/plan.py --card")
    parser.add_argument("--flags", default="", help="more flags for every run")
    parser.add_argument("--timeout", type=int, default=150, help="seconds of a run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    options.device = device_name(options.gpus)
    card = Card.of(options.card)
    for case in CASES:
        if case.name in options.only:
            ranking(case, card, options)
    if "fit" in options.only:
        fit(card, options)


if __name__ == "__main__":
    main()
