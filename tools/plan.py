"""Plan a run before it has GPUs: the best mesh, where memory and time go, days and failures. Needs no GPU but for
`calibrate`, and no torch but for that and `confirm`.

    python tools/plan.py search --config MODEL RECIPE --vocab-size 100288 --gpus 256 --output plan.yaml
    python tools/plan.py explain --config MODEL RECIPE plan.yaml --vocab-size 100288 --gpus 256
    python tools/plan.py run --config MODEL RECIPE plan.yaml --vocab-size 100288 --gpus 256 --tokens 10T
    python tools/plan.py confirm --config MODEL RECIPE plan.yaml --vocab-size 100288 --gpus 256
    torchrun --nproc-per-node 8 tools/plan.py calibrate --output card.yaml      # on a node; then --card card.yaml

All other flags are those of pretrain_yoco.py. `search` keeps what the command line says of the mesh, the micro-batch
and recompute, and decides what only configs say.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import yaml

from yoco_megatron.costs.card import SHIPPED, Card
from yoco_megatron.planning import flags, report
from yoco_megatron.planning.mesh import Plan
from yoco_megatron.planning.run import Site, plan_run
from yoco_megatron.planning.search import search, settings
from yoco_megatron.utils.files import write_atomically

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def token_count(text: str) -> int:
    """12_000, 300B or 1.6T."""
    found = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)([KMBT]?)", text.upper())
    count = round(float(found[1]) * SUFFIXES[found[2]]) if found else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens such as 300B")
    return count


def gpu_count(text: str) -> int:
    """At least one."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of GPUs")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("search", "rank all meshes"),
        ("explain", "bytes and milliseconds of one mesh, stage by stage"),
        ("run", "days, energy, failures and saves of a whole run"),
        ("confirm", "a step of the trainer as each distinct rank, on this CPU; needs torch and minutes"),
        ("calibrate", "measure this node's GPUs and write the file of a card"),
    ):
        command = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        if name == "calibrate":
            command.add_argument("--output", type=Path, required=True, help="YAML file for the card")
            command.add_argument("--base", default="h100", help="card or file that the rest is taken from")
            command.add_argument("--trial", action="store_true", help="tiny sizes, on a CPU too, to see that all runs")
            continue
        command.add_argument("--gpus", type=gpu_count, required=True)
        command.add_argument("--card", default="h100", help=f"{', '.join(SHIPPED)}, or the file of a card")
        if name == "search":
            command.add_argument("--precisions", nargs="+", choices=["bf16", "fp8"], default=[], help="to try, of both")
            command.add_argument("--top", type=int, default=8, help="plans to print")
            command.add_argument("--output", type=Path, help="YAML file for the flags of the first plan")
        elif name == "explain":
            command.add_argument("--picture", help="file for a picture (.png, .svg); needs matplotlib")
        elif name == "confirm":
            command.add_argument("--jobs", type=int, default=os.cpu_count(), help="ranks at a time, each on one core")
        else:
            site = Site()
            command.add_argument("--tokens", type=token_count, required=True, help="to train on, for example 10T")
            command.add_argument("--corpus-tokens", type=token_count, help="that there are, for the number of epochs")
            command.add_argument("--failures-per-gpu-hour", type=float, default=site.failures_per_gpu_hour)
            command.add_argument("--save-stall", type=float, default=site.save_stall, help="seconds a save stops steps")
            command.add_argument("--restart-seconds", type=float, default=site.restart)
            command.add_argument("--power-usage", type=float, default=site.power_usage, help="PUE of the building")
    return parser


def main(argv: list[str]) -> str:
    own, rest = build_parser().parse_known_args(argv)
    if own.command == "confirm":
        return _confirm(rest, own.gpus, own.jobs)
    if own.command == "calibrate":
        if rest:
            raise ValueError(f"unrecognized arguments: {' '.join(rest)}")
        return _calibrate(own.output, Card.of(own.base), own.trial)
    args, given = flags.parse(rest, own.gpus)
    card = Card.of(own.card)
    if own.command == "search":
        found = search(args, given, card, tuple(own.precisions))
        decided = settings(found.best, args)
        if own.output:
            head = f"# tools/plan.py search, {found.best.mesh} on {own.gpus} {card.name}\n"
            write_atomically(own.output, head + yaml.safe_dump(decided, sort_keys=False))
        return report.search_report(found, decided, max(1, own.top))
    plan = Plan.of(args, card)
    if own.command == "explain":
        if own.picture:
            report.picture(plan, own.picture)
        return report.explain_report(plan)
    site = Site(own.failures_per_gpu_hour, own.save_stall, own.restart_seconds, power_usage=own.power_usage)
    run = plan_run(plan, own.tokens, site)
    return report.run_report(plan, run, site, own.tokens, own.corpus_tokens)


def _calibrate(output: Path, base: Card, trial: bool) -> str:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from yoco_megatron.startup.prepare import prepare

    prepare()
    from yoco_megatron.calibration.calibrate import calibrate

    return calibrate(output, base, trial)


def _confirm(argv: list[str], gpus: int, jobs: int) -> str:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all is fake
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import pretrain_yoco  # here, because torch and Megatron take seconds
    from yoco_megatron.dry_run.confirm import confirm
    from yoco_megatron.dry_run.report import report

    confirmed = confirm(pretrain_yoco.main, argv, gpus, jobs)
    if confirmed.problems:
        print(report(confirmed))
        raise ValueError(f"the ranks do not fit together: {confirmed.problems[0]}")
    return report(confirmed)


if __name__ == "__main__":
    try:
        if said := main(sys.argv[1:]):
            print(said)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"plan.py: error: {error}")
