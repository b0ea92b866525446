"""What happens after an attempt, and whether another may start: asked by every launcher, before and after training.

    python -m yoco_megatron.resilience.policy begin RUN [--max-restarts 3]
    python -m yoco_megatron.resilience.policy end RUN --exit-code 1

Prints one line, `VERDICT reason`, and for `end` the hosts to exclude on a second one:
  done     finished, or stopped on purpose: never start again
  stop     an error that another attempt would repeat, or too many attempts in a row without a new checkpoint
  go       (begin) start; the attempt's number follows
  requeue  (end) start again
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yoco_megatron.checkpoint.layout import tracked_iteration

# Whoever says one of these decides for all; the first in this list that any process said.
PRECEDENCE = ["user_error", "storage", "hardware", "rolled_back", "stopped", "finished", "requeue", "crash"]
# What a process says when another one is gone.
ECHO = re.compile(r"NCCL|DistBackend|DistNetwork|gloo|Connection (closed|reset)|Broken pipe|store", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """`what` is done, stop, go or requeue."""

    what: str
    reason: str
    exclude: list[str] = field(default_factory=list)


def attempts(folder: Path) -> list[dict[str, Any]]:
    """All lines of attempts.jsonl, oldest first; a line cut short by a crash is left out."""
    path = folder / "attempts.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def _append(folder: Path, line: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def fruitless(lines: list[dict[str, Any]], checkpoint: int | None) -> int:
    """How many attempts in a row, up to the newest, started from `checkpoint` and brought no newer one."""
    count = 0
    for line in reversed([line for line in lines if line["event"] == "begin"]):
        if line["checkpoint"] != checkpoint:
            break
        count += 1
    return count


def begin(folder: Path, max_restarts: int) -> tuple[Verdict, int]:
    """Whether an attempt may start, and its number. Notes its start."""
    lines = attempts(folder)
    ends = [line for line in lines if line["event"] == "end"]
    number = sum(line["event"] == "begin" for line in lines)
    checkpoint = tracked_iteration(folder / "checkpoints")
    # Rolling back is progress although the newest checkpoint gets older; it has its own limit.
    if ends and ends[-1]["verdict"] == "done" and ends[-1].get("kind") == "finished":
        return Verdict("done", f"the run has finished; to train longer, remove {folder / 'attempts.jsonl'}"), number
    tries = fruitless(lines, checkpoint)
    if tries > max_restarts:
        reasons = [line["reason"] for line in ends[-tries:]] or ["the nodes were lost"]
        return (
            Verdict(
                "stop",
                f"{tries} attempts in a row ended without a new checkpoint (newest: iteration {checkpoint}); "
                f"the last reason: {reasons[-1]}. Repair it, then remove {folder / 'attempts.jsonl'} and start again",
            ),
            number,
        )
    # Of an attempt with this number, from before attempts.jsonl was removed: not this one's last words.
    for old in ("outcomes", "stacks", "preflight"):
        shutil.rmtree(folder / old / str(number), ignore_errors=True)
    line = {"event": "begin", "attempt": number, "checkpoint": checkpoint, "time": time.time()}
    _append(folder, line | {"job": os.environ.get("SLURM_JOB_ID"), "nodes": os.environ.get("SLURM_JOB_NODELIST")})
    return Verdict("go", str(number)), number


def end(folder: Path, exit_code: int) -> Verdict:
    """What to do after the newest attempt, whose launcher ended with `exit_code`. Notes its end."""
    lines = attempts(folder)
    number = sum(line["event"] == "begin" for line in lines) - 1
    said = [json.loads(path.read_text()) for path in sorted((folder / "outcomes" / str(number)).glob("[0-9]*.json"))]
    hung = [path for path in sorted((folder / "stacks" / str(number)).glob("*.txt")) if path.stat().st_size]
    verdict, kind = judge(said, [str(path) for path in hung], exit_code)
    checkpoint = tracked_iteration(folder / "checkpoints")
    line = {"event": "end", "attempt": number, "verdict": verdict.what, "kind": kind, "reason": verdict.reason}
    _append(folder, line | {"exit_code": exit_code, "checkpoint": checkpoint, "time": time.time()})
    return verdict


def judge(said: list[dict[str, Any]], hung: list[str], exit_code: int) -> tuple[Verdict, str]:
    """The verdict on one attempt and the kind of its outcome, from what its processes said.

    Processes that want to go on exit with 0, because torchrun and srun kill the others at the first that does not.

    Args:
        said: outcomes of the processes that could say something.
        hung: files with stacks of processes that the watchdog found hanging.
        exit_code: of srun or torchrun.
    """
    kinds = {one["kind"] for one in said}
    kind = next((kind for kind in PRECEDENCE if kind in kinds), "crash")
    if kind in ("finished", "stopped", "requeue") and (exit_code or "crash" in kinds):
        kind = "crash"  # some processes left as they should, another did not
    reason = _first_cause([one for one in said if one["kind"] == kind]) or f"no process left a reason, exit {exit_code}"
    if kind == "crash" and hung:
        kind, reason = "hang", f"{len(hung)} processes hung; their Python stacks: {hung[0]}"
    if kind in ("finished", "stopped"):
        return Verdict("done", reason), kind
    if kind in ("user_error", "storage"):
        return Verdict("stop", reason), kind
    suspects = sorted({one["host"] for one in said if one["kind"] == "hardware" and one["suspect"]})
    return Verdict("requeue", reason, suspects), kind


def _first_cause(said: list[dict[str, Any]]) -> str | None:
    """The earliest reason that is no echo of another process's end."""
    said = sorted(said, key=lambda one: one["time"])
    causes = [one for one in said if not ECHO.search(one["reason"])] or said
    return f"{causes[0]['reason']} (rank {causes[0]['rank']} on {causes[0]['host']})" if causes else None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("when", choices=["begin", "end"])
    parser.add_argument("folder", type=Path, help="the run folder")
    parser.add_argument("--max-restarts", type=int, default=3, help="restarts without a new checkpoint (default 3)")
    parser.add_argument("--exit-code", type=int, default=0, help="of srun or torchrun")
    args = parser.parse_args(argv)
    if args.when == "begin":
        verdict, _ = begin(args.folder, args.max_restarts)
    else:
        verdict = end(args.folder, args.exit_code)
    print(verdict.what, verdict.reason)
    if verdict.exclude:
        print(",".join(verdict.exclude))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        print(f"policy: error: the run folder cannot be used: {error}", file=sys.stderr)
        sys.exit(2)
