"""Benchmark results are data: one JSON line a row in results.jsonl, from which RESULTS.md is made.

python benchmarks/record.py        # write RESULTS.md and its picture anew
"""

import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from headlines import draw as draw_headlines
from headlines import short, table

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton")


def versions() -> dict[str, str]:
    """Installed versions of what decides the speed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that ran: what COMMIT says (a copy of the tree may carry another history), else the repository's."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return os.environ.get("COMMIT") or run.stdout.strip() or "unknown"


def record(
    output: Path,
    *,
    benchmark: str,
    case: str,
    metric: str,
    unit: str,
    value: float,
    device: str,
    peer: str | None = None,
    peer_value: float | None = None,
    higher_is_better: bool = True,
    rounds: Sequence[tuple[float, float]] = (),
    flags: str = "",
) -> None:
    """Append one row; `ratio` above 1 means that we are better than the peer.

    `flags`: what a trial chose besides the case's own.
    `rounds`: (ours, the peer's) of turns taken one after the other. Their median ratio counts, and `spread` holds the
    lowest and the highest.
    """

    def ratio_of(ours: float, theirs: float) -> float:
        return round(ours / theirs if higher_is_better else theirs / ours, 4)

    ratio = ratio_of(value, peer_value) if peer_value else None
    ratios = sorted(ratio_of(*values) for values in rounds)
    row = {
        "benchmark": benchmark,
        "case": case,
        "metric": metric,
        "unit": unit,
        "value": value,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": round(median(ratios), 4) if ratios else ratio,
        "device": device,
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]).replace(f"{HERE.parent}/", ""),
    }
    if len(ratios) > 1:
        row |= {"spread": [ratios[0], ratios[-1]], "rounds": len(ratios)}
    if flags:
        row["flags"] = flags
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")


def results_page(rows: list[dict]) -> str:
    """RESULTS.md: a table a benchmark, newest rows last."""
    lines = [
        "# Results",
        "",
        "Made from results.jsonl by `python benchmarks/record.py`. Ratio above 1: ours is better. What they come to,",
        "in bf16 with gated retention where nothing else is said; the Transformer is Megatron's own GPT in training,",
        "and in inference a Llama of the same sizes in the same engine:",
        "",
        "![training speed, memory and prefill time beside the Transformer's](../docs/speed_and_memory.svg)",
        "",
        *table(rows),
        "",
        "Read on: [in short](../docs/performance.md), [how it was measured, and what was tried](NOTES.md). All rows,",
        "also those that later ones have overtaken, the newest last:",
        "",
    ]
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        lines += [
            f"## {benchmark}",
            "",
            "| case | metric | value | peer | peer's value | ratio | device | commit | date |",
        ]
        lines.append("|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            if row["benchmark"] != benchmark:
                continue
            peer_value = "" if row["peer_value"] is None else f"{short(row['peer_value'])} {row['unit']}"
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            if "spread" in row:
                ratio += " ({:.3f} to {:.3f} in {} turns)".format(*row["spread"], row["rounds"])
            case = " with ".join(filter(None, (row["case"], row.get("flags"))))
            lines.append(
                f"| {case} | {row['metric']} | {short(row['value'])} {row['unit']} | {row['peer'] or ''} | "
                f"{peer_value} | {ratio} | {row['device']} | {row['commit']} | {row['date']} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    source = HERE / "results.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    (HERE / "RESULTS.md").write_text(results_page(rows))
    draw_headlines(HERE.parent / "docs/speed_and_memory.svg", rows)
