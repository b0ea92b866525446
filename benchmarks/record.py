"""Benchmark results are data: one JSON line a row in results.jsonl, from which RESULTS.md is made.

python benchmarks/record.py        # write RESULTS.md anew
"""

import datetime
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

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
) -> None:
    """Append one row; `ratio` above 1 means that we are better than the peer."""
    ratio = None
    if peer_value:
        ratio = round(value / peer_value if higher_is_better else peer_value / value, 4)
    row = {
        "benchmark": benchmark,
        "case": case,
        "metric": metric,
        "unit": unit,
        "value": value,
        "peer": peer,
        "peer_value": peer_value,
        "ratio": ratio,
        "device": device,
        "versions": versions(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]).replace(f"{HERE.parent}/", ""),
    }
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")


def results_page(rows: list[dict]) -> str:
    """RESULTS.md: a table a benchmark, newest rows last."""
    lines = [
        "# Results",
        "",
        "Made from results.jsonl by `python benchmarks/record.py`. Ratio above 1: ours is better.",
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
            peer_value = "" if row["peer_value"] is None else f"{_figure(row['peer_value'])} {row['unit']}"
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            lines.append(
                f"| {row['case']} | {row['metric']} | {_figure(row['value'])} {row['unit']} | {row['peer'] or ''} | "
                f"{peer_value} | {ratio} | {row['device']} | {row['commit']} | {row['date']} |"
            )
        lines.append("")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    source = HERE / "results.jsonl"
    (HERE / "RESULTS.md").write_text(results_page([json.loads(line) for line in source.read_text().splitlines()]))
