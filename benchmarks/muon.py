"""Muon against AdamW on real text: a small YOCO of each self-decoder, the same tokens, the best learning rate of each.

    python benchmarks/muon.py prepare            # text, tokenizer, tokens: three minutes on 64 cores
    python benchmarks/muon.py train --gpus 4     # a slice of nine minutes: repeat it until it says: all done
    python benchmarks/muon.py report --record    # table, picture, rows; also of what is done so far

The runs are those of paper_ordering.py (--folder runs/paper_ordering goes on with its text and its AdamW): each
optimizer at each learning rate for --sweep-tokens, then the best for --tokens from every seed. Muon has
configs/optimizer/muon.yaml, and all else of AdamW. On a CPU, as a test of some minutes: --size tiny --length 256
--batch-tokens 4096 --sweep-tokens 4e4 --tokens 8e4 --rates 1e-3 --seeds 1 --split 99.9,0.02,0 --gpus 0.
"""

import argparse
from statistics import fmean
from typing import Any

from paper_ordering import (
    TITLES,
    Case,
    Losses,
    draw_groups,
    final,
    make_parser,
    middle_first,
    read_finished,
    record_runs,
    run,
)
from record import record

from yoco_megatron.evaluation import comparison
from yoco_megatron.evaluation.run_curves import RunCurves

OPTIMIZERS = {"": "AdamW", "muon": "Muon"}
"""By variant."""
RATES = [6e-4, 1e-3, 2e-3, 4e-3]


def sweep_of(model: str, variant: str, options: argparse.Namespace) -> list[Case]:
    """One optimizer, at each learning rate."""
    rates = middle_first(options.rates)
    return [Case(model, variant, rate, options.seeds[0], options.sweep_tokens) for rate in rates]


def best_of(model: str, variant: str, options: argparse.Namespace, losses: Losses) -> list[Case]:
    """The best learning rate of the sweep, in full length from every seed; none before all are known."""
    own = sweep_of(model, variant, options)
    if not all(case in losses for case in own):
        return []
    best = min(own, key=lambda case: losses[case])
    return [best._replace(seed=seed, tokens=options.tokens) for seed in options.seeds]


def cases(options: argparse.Namespace, losses: Losses) -> list[Case]:
    """All runs that are known to be needed, given the losses so far; most telling first."""
    pairs = [(model, variant) for model in options.models for variant in OPTIMIZERS]
    sweeps = [case for alike in zip(*(sweep_of(*pair, options) for pair in pairs)) for case in alike]
    return sweeps + [case for pair in pairs for case in best_of(*pair, options, losses) if case not in sweeps]


def report(options: argparse.Namespace) -> None:
    """Print all results and draw the curves; with --record, append rows to --output."""
    found = read_finished(options, cases)
    rows = comparison.compare(list(found.values()))
    print(comparison.table(rows))
    losses = {case: final(curves) for case, curves in found.items()}
    best: dict[str, list[Case]] = {}
    swept: dict[str, list[Case]] = {}
    for model in options.models:
        for variant, optimizer in OPTIMIZERS.items():
            title = f"{TITLES[model]}, {optimizer}"
            alike = [case for case in best_of(model, variant, options, losses) if case in losses]
            if alike:
                best[title] = alike
                swept[title] = sorted(sweep_of(model, variant, options))
                mean = fmean(losses[case] for case in alike)
                print(f"best {title}, lr {alike[0].rate:g}: {mean:.4f}, mean of {len(alike)} seeds")
    if options.record:
        record_all(found, rows, best, options)
    if best:
        draw_groups(found, best, swept, options)


def record_all(
    found: dict[Case, RunCurves], rows: list[dict[str, Any]], best: dict[str, list[Case]], options: argparse.Namespace
) -> None:
    """A row for each run, and for the best of Muon beside AdamW's."""
    common = record_runs("muon", found, rows, options)
    means = {title: fmean(final(found[case]) for case in alike) for title, alike in best.items()}
    for model in map(TITLES.get, options.models):
        if {f"{model}, AdamW", f"{model}, Muon"} <= means.keys():
            name = f"{options.size}, {comparison.short(options.tokens)} tokens, best of {model}, Muon"
            record(options.output, case=name, metric="validation loss", unit="nats",
                   value=round(means[f"{model}, Muon"], 4), peer="best of AdamW",
                   peer_value=round(means[f"{model}, AdamW"], 4), higher_is_better=False, **common)  # fmt: skip


if __name__ == "__main__":
    parser = make_parser(__doc__, "muon", ["retention", "window"])
    parser.set_defaults(rates=RATES)
    run(parser.parse_args(), cases, report)
