"""Compare training runs: a table, and pictures of losses against tokens, FLOPs and hours.

    tools/compare_runs.py RUN RUN ... --output FOLDER

A RUN is a folder with `tensorboard` in it (--tensorboard-dir RUN/tensorboard). FOLDER gets losses.svg, comparison.json
and, where the runs were evaluated while training, evaluation.svg. Of runs that were restarted, what was abandoned is
left out. Losses are in nats a token; a training loss is the mean of the logged steps of the last 2% of the tokens.
"""

import argparse
import json
import sys
from pathlib import Path

from yoco_megatron.evaluation import comparison, pictures
from yoco_megatron.evaluation.results import plain
from yoco_megatron.evaluation.run_curves import read_run
from yoco_megatron.utils.files import write_atomically


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--names", nargs="+", help="what to call the runs, in their order; default: their folders")
    parser.add_argument("--output", type=Path, help="folder for pictures and JSON; default: the table alone")
    parser.add_argument("--format", choices=["svg", "png"], default="svg", help="of pictures")
    options = parser.parse_args()
    if options.names and len(set(options.names)) != len(options.runs):
        parser.error(f"--names has {len(set(options.names))} different names for {len(options.runs)} runs")
    try:
        names = options.names or comparison.names_of(options.runs)
        runs = [read_run(run, name) for run, name in zip(options.runs, names)]
        rows = comparison.compare(runs)
        print(comparison.table(rows))
        if options.output:
            write_atomically(options.output / "comparison.json", json.dumps(plain(rows), indent=1) + "\n")
            pictures.draw_runs(options.output / f"losses.{options.format}", runs)
            if pictures.evaluation_tags(runs):
                pictures.draw_evaluations(options.output / f"evaluation.{options.format}", runs)
    except (ValueError, OSError) as error:
        sys.exit(f"compare_runs.py: error: {error}")


if __name__ == "__main__":
    main()
