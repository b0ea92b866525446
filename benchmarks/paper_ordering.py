"""The ordering of the YOCO paper's scaling study on real text: gated retention, sliding window, Transformer.

    python benchmarks/paper_ordering.py prepare            # text, tokenizer, tokens: three minutes on 64 cores
    python benchmarks/paper_ordering.py train --gpus 4     # a slice of nine minutes: repeat it until it says: all done
    python benchmarks/paper_ordering.py report --record    # table, picture, rows; also of what is done so far

Trained are, for --sweep-tokens: each model at each learning rate, the Transformer also with Megatron's initialisation
at each, and each YOCO's best without its scaled embedding; then each model's best for --tokens from every seed.
A run that is done needs its checkpoints no more: its folder without them can go to another machine, where the others
are trained on the same text. Everything else is alike:
text, order of batches, tokens, and configs/recipe/scaling.yaml with a shorter schedule. Compared are the losses on
the validation part: documents that are not trained on, no copies of which are (but for near ones, such as another
version of a file). On a CPU, as a test of some minutes: --size tiny --length 256 --batch-tokens 4096 --sweep-tokens 4e4
--tokens 8e4 --rates 1e-3 --seeds 1 --split 99.9,0.02,0 --gpus 0.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import site_text
from record import record
from runs import ROOT, device_name
from slices import Job, add_arguments, gpus_of, run_slice

from yoco_megatron.evaluation import comparison, pictures
from yoco_megatron.evaluation.run_curves import VALIDATION, RunCurves, read_run

CONFIGS = {"retention": "yoco_{}", "window": "yoco_{}_swa", "transformer": "transformer_{}"}
TITLES = {"retention": "YOCO, gated retention", "window": "YOCO, sliding window", "transformer": "Transformer"}
VARIANTS = {
    "": (),
    "megatron-init": ("--init-law", "megatron"),
    "unscaled": ("--no-scale-embedding",),
    "muon": ("--config", "configs/optimizer/muon.yaml"),  # benchmarks/muon.py
    "mtp": ("--mtp-num-layers", "1"),  # benchmarks/mtp.py
}


class Case(NamedTuple):
    """One run."""

    model: str
    variant: str
    rate: float
    seed: int
    tokens: float

    def name(self) -> str:
        variant = f"_{self.variant}" if self.variant else ""
        return f"{self.model}{variant}_{self.rate:g}_{self.seed}_{comparison.short(self.tokens)}"

    def title(self) -> str:
        return f"{self.without_seed()}, seed {self.seed}"

    def without_seed(self) -> str:
        variant = f", {self.variant}" if self.variant else ""
        return f"{TITLES[self.model]}{variant}, lr {self.rate:g}"


Losses = dict[Case, float]
"""Validation losses at the end."""
CasesOf = Callable[[argparse.Namespace, Losses], list[Case]]
"""All runs that are known to be needed, given the losses so far; most telling first."""


def middle_first(rates: list[float]) -> list[float]:
    """In the order in which they tell most."""
    return sorted(rates, key=lambda rate: abs(rates.index(rate) - len(rates) // 2))


def cases(options: argparse.Namespace, losses: Losses) -> list[Case]:
    """Those of the study."""
    rates = middle_first(options.rates)
    first = options.seeds[0]
    sweep = [Case(model, "", rate, first, options.sweep_tokens) for rate in rates for model in options.models]
    if "transformer" in options.models:
        sweep += [Case("transformer", "megatron-init", rate, first, options.sweep_tokens) for rate in rates]
    more = []
    for model in options.models:
        own = [case for case in sweep if case.model == model]
        if all(case in losses for case in own):
            best = min(own, key=lambda case: losses[case])
            sweep += [] if model == "transformer" else [best._replace(variant="unscaled")]
            more += [best._replace(seed=seed, tokens=options.tokens) for seed in options.seeds]
    return sweep + sorted((case for case in more if case not in sweep), key=lambda case: options.seeds.index(case.seed))


def job_of(case: Case, options: argparse.Namespace) -> Job:
    """The run of a case."""
    batch = options.batch_tokens // options.length
    steps = max(1, round(case.tokens / options.batch_tokens))
    config = [f"configs/model/{CONFIGS[case.model].format(options.size)}.yaml", "configs/recipe/scaling.yaml"]
    flags = [
        *("--config", *config),
        *site_text.flags(options.folder, options.split),
        *("--seq-length", options.length, "--max-position-embeddings", options.length),
        *("--micro-batch-size", min(options.micro_batch_size, batch), "--global-batch-size", batch),
        *("--lr", case.rate, "--lr-warmup-iters", max(1, steps // 20), "--lr-decay-iters", steps, "--seed", case.seed),
        *("--eval-interval", max(1, steps // options.evaluations), "--full-validation"),
        *("--save-interval", max(1, steps // 2), "--log-interval", 10),
        *("--tensorboard-log-interval", 5, "--num-workers", 2 if options.gpus else 0),
        *VARIANTS[case.variant],
        *options.flags.split(),
    ]
    return Job(options.folder / "runs" / case.name(), tuple(map(str, flags)), steps)


def read_finished(options: argparse.Namespace, cases: CasesOf = cases) -> dict[Case, RunCurves]:
    """The curves of the runs that are done. Raises SystemExit if none is."""
    found: dict[Case, RunCurves] = {}
    while True:  # results make more cases
        losses = {case: final(run) for case, run in found.items()}
        new = [case for case in cases(options, losses) if case not in found and job_of(case, options).done()]
        if not new:
            break
        found |= {case: read_run(job_of(case, options).folder, case.name()) for case in new}
    if not found:
        raise SystemExit("no run is done yet: train first")
    return found


def final(run: RunCurves) -> float:
    """The validation loss at the end."""
    value = run.value(VALIDATION)
    assert value is not None, f"{run.name} was not evaluated"
    return value


def train(options: argparse.Namespace, cases: CasesOf = cases) -> None:
    """A slice of all runs."""
    known: dict[Case, float] = {}

    def jobs() -> list[Job]:
        for case in cases(options, known):
            job = job_of(case, options)
            if case not in known and job.done():
                known[case] = final(read_run(job.folder))
        return [job_of(case, options) for case in cases(options, known)]

    done = run_slice(jobs, gpus_of(options), options.seconds)
    todo = [job for job in jobs() if not job.done()]
    print("all done" if done else f"to go: {', '.join(job.name for job in todo)}: repeat this command", flush=True)


def best_of(found: dict[Case, RunCurves], options: argparse.Namespace) -> dict[str, list[Case]]:
    """For each model, the best learning rate (and of the Transformer, initialisation) of the sweep, in all seeds.

    In full length where all models have such a run, else the sweep's own. A YOCO without its scaled embedding is not
    the paper's, and does not count.
    """
    sweep = [case for case in cases(options, {}) if case in found]
    firsts = {
        model: min((case for case in sweep if case.model == model), key=lambda case: final(found[case]))
        for model in dict.fromkeys(case.model for case in sweep)
    }
    for tokens in (options.tokens, options.sweep_tokens):
        best = {
            model: [case for case in found if case._replace(seed=first.seed) == first._replace(tokens=tokens)]
            for model, first in firsts.items()
        }
        if all(best.values()):
            break
    return best


def report(options: argparse.Namespace) -> None:
    """Print all results and draw the curves; with --record, append rows to --output."""
    found = read_finished(options)
    rows = comparison.compare(list(found.values()))
    print(comparison.table(rows))
    best = best_of(found, options)
    means = {model: fmean(final(found[case]) for case in alike) for model, alike in best.items()}
    print()
    for model, alike in best.items():
        losses = ", ".join(f"{final(found[case]):.4f}" for case in alike)
        tokens = comparison.short(alike[0].tokens)
        print(f"best {alike[0].without_seed()}, {tokens} tokens: {means[model]:.4f} ({losses})")
    if options.record:
        record_all(found, rows, best, options)
    (options.folder / "comparison.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(found, best, options)


def record_all(
    found: dict[Case, RunCurves], rows: list[dict[str, Any]], best: dict[str, list[Case]], options: argparse.Namespace
) -> None:
    """A row for each run, and for the best of each YOCO beside the Transformer's."""
    means = {model: fmean(final(found[case]) for case in alike) for model, alike in best.items()}
    common = record_runs("paper ordering", found, rows, options)
    for model, alike in best.items():
        if model != "transformer" and "transformer" in means:
            size = f"{options.size}, {comparison.short(alike[0].tokens)} tokens"
            name = f"{size}, best of {TITLES[model]}, mean of {len(alike)} seeds"
            peer = f"best of Transformer, mean of {len(best['transformer'])} seeds"
            record(options.output, case=name, metric="validation loss", unit="nats", value=round(means[model], 4),
                   peer=peer, peer_value=round(means["transformer"], 4), higher_is_better=False, **common)  # fmt: skip


def record_runs(
    benchmark: str, found: dict[Case, RunCurves], rows: list[dict[str, Any]], options: argparse.Namespace
) -> dict[str, Any]:
    """Loss and speed of each run; returns what all rows of this benchmark have in common."""
    device = options.device or (device_name(1) if options.gpus else "CPU")
    common: dict[str, Any] = dict(benchmark=benchmark, device=device)
    for case, row in zip(found, rows):
        name = f"{options.size}, {comparison.short(case.tokens)} tokens, {case.title()}"
        record(options.output, case=name, metric="validation loss", unit="nats", value=round(row["validation_loss"], 4),
               **common)  # fmt: skip
        record(options.output, case=name, metric="speed", unit="tokens/s", value=round(row["tokens_per_second"]),
               **common)  # fmt: skip
    return common


def draw(found: dict[Case, RunCurves], best: dict[str, list[Case]], options: argparse.Namespace) -> None:
    """The best of each model, and all of each variant."""
    swept = {}
    for model in best:
        for variant in VARIANTS:
            alone = (model, variant, options.sweep_tokens)
            own = sorted(case for case in found if (case.model, case.variant, case.tokens) == alone)
            swept[f"{TITLES[model]}{variant and ', '}{variant}"] = own
    draw_groups(found, {TITLES[model]: alike for model, alike in best.items()}, swept, options)


def draw_groups(
    found: dict[Case, RunCurves],
    best: dict[str, list[Case]],
    swept: dict[str, list[Case]],
    options: argparse.Namespace,
) -> None:
    """Validation losses of the best cases against tokens, and final losses of sweeps against the learning rate, each by
    its title; a sweep has the colour of the best one whose title its own begins with."""
    with pictures.figure(options.picture, 1, 2) as (curves, rates):
        colors = {title: f"C{number}" for number, title in enumerate(best)}
        for title, alike in best.items():
            for case in alike:
                points = found[case].curves[VALIDATION]
                label = f"{title}, lr {case.rate:g}" if case is alike[0] else None
                tokens = found[case].tokens(points.steps)
                curves.plot(tokens, points.values, "o-", color=colors[title], markersize=3, linewidth=1, label=label)
        styles = dict(zip(VARIANTS, ("o-", "s--", "^:", "D-.")))
        for title, own in swept.items():
            if own:
                color = colors[max((one for one in best if title.startswith(one)), key=len)]
                x, y = [case.rate for case in own], [final(found[case]) for case in own]
                rates.plot(x, y, styles[own[0].variant], color=color, markersize=4, linewidth=1, label=title)
        pictures.against_tokens(curves)
        curves.set_ylabel("validation loss (nats a token)")
        low = min(final(run) for run in found.values())
        curves.set_ylim(low - 0.05, low + 2)
        rates.set_xscale("log")
        rates.set_xlabel(f"learning rate (the sweep, {comparison.short(options.sweep_tokens)} tokens)")
        rates.set_ylabel("final validation loss")
        for panel in (curves, rates):
            panel.legend(fontsize=7)


def make_parser(doc: str, name: str, models: list[str]) -> argparse.ArgumentParser:
    """Options of a comparison whose runs lie in runs/`name`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "train", "report"])
    parser.add_argument("--split", default="98,2,0", help="parts for training, validation, test")
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--rates", nargs="+", type=float, default=[6e-4, 1e-3, 2e-3], help="learning rates")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1234, 4321])
    parser.add_argument("--tokens", type=float, default=300e6, help="of each model's best, in all seeds")
    parser.add_argument("--sweep-tokens", type=float, default=100e6, help="of a run that chooses the learning rate")
    parser.add_argument("--length", type=int, default=2048, help="of a sequence")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--evaluations", type=int, default=10, help="of a run, on the whole validation part")
    add_arguments(parser, name)
    parser.add_argument("--record", action="store_true", help="report: append rows to --output")
    parser.add_argument("--device", help="report: what the runs ran on, where it is not this machine")
    parser.add_argument("--picture", type=Path, default=ROOT / f"docs/{name}.svg")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    return parser


def run(options: argparse.Namespace, cases: CasesOf, report: Callable[[argparse.Namespace], None]) -> None:
    """What the command line asks for."""
    options.folder = options.folder.resolve()
    if options.what == "prepare":
        site_text.prepare(options.folder, options.text, options.vocab_size)
    elif options.what == "train":
        train(options, cases)
    else:
        report(options)


if __name__ == "__main__":
    run(make_parser(__doc__, "paper_ordering", list(CONFIGS)).parse_args(), cases, report)
