"""Exit policy: whether an attempt may start, and what happens after one. Launchers ask before and after training.

    python -m yoco_megatron.resilience.policy begin RUN [--max-restarts 3]
    python -m yoco_megatron.resilience.policy end RUN --exit-code 1

Prints one line, `VERDICT reason`, and for `end` the hosts to exclude on a second one:
  done     finished, or stopped on purpose: never start again
  stop     an error that another attempt would repeat, or too many attempts without a new trained step
  go       (begin) start; the number of the attempt follows
  requeue  (end) start another attempt
"""

import argparse
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from yoco_megatron.checkpoint.layout import path_of, tracked_iteration
from yoco_megatron.resilience import run_lock
from yoco_megatron.resilience.records import Kind, append_attempt, attempts, outcomes, trained_steps
from yoco_megatron.utils.small_files import BadFile

PRECEDENCE = get_args(Kind)
# Errors that only report another process's death.
SECONDARY_FAILURE = re.compile(
    r"NCCL|DistBackend|DistNetwork|gloo|Connection (closed|reset)|Broken pipe|store", re.IGNORECASE
)


@dataclass(frozen=True)
class Verdict:
    """`what` is done, stop, go or requeue; `exclude` names hosts to exclude from the next attempt."""

    what: str
    reason: str
    exclude: list[str] = field(default_factory=list)


def newest_trained_steps(folder: Path) -> int | None:
    """Trained steps of the run's newest checkpoint; None without one."""
    iteration = tracked_iteration(folder / "checkpoints")
    return None if iteration is None else trained_steps(path_of(folder / "checkpoints", iteration))


def attempts_without_progress(lines: list[dict[str, Any]], trained: int | None) -> int:
    """How many attempts in a row, up to the newest, started with `trained` steps and saved no further one."""
    count = 0
    for line in reversed([line for line in lines if line["event"] == "begin"]):
        if line.get("trained_steps", line["checkpoint"]) != trained:
            break
        count += 1
    return count


def begin(folder: Path, max_restarts: int) -> tuple[Verdict, int]:
    """Whether an attempt may start, and its number. Records its start."""
    lines = attempts(folder)
    ends = [line for line in lines if line["event"] == "end"]
    number = sum(line["event"] == "begin" for line in lines)
    checkpoint = tracked_iteration(folder / "checkpoints")
    if ends and ends[-1]["verdict"] == "done" and ends[-1].get("kind") == "finished":
        return Verdict("done", f"the run has finished; to train longer, remove {folder / 'attempts.jsonl'}"), number
    if other := run_lock.in_use(folder / "checkpoints"):
        return Verdict("stop", other), number
    trained = newest_trained_steps(folder)
    failed = attempts_without_progress(lines, trained)
    if failed > max_restarts:
        unknown = "it left none, as where a node is lost, or preflight finds one unfit"
        reason = lines[-1]["reason"] if lines[-1]["event"] == "end" else unknown
        return (
            Verdict(
                "stop",
                f"{failed} attempts in a row saved no new trained step (newest checkpoint: iteration {checkpoint}); "
                f"the last reason: {reason}. Fix it, then remove {folder / 'attempts.jsonl'} and start again",
            ),
            number,
        )
    # Records of an earlier attempt with this number, from before attempts.jsonl was removed.
    for old in ("outcomes", "stacks", "preflight"):
        shutil.rmtree(folder / old / str(number), ignore_errors=True)
    line = {"event": "begin", "attempt": number, "checkpoint": checkpoint, "trained_steps": trained}
    line |= {"time": time.time()}
    append_attempt(
        folder, line | {"job": os.environ.get("SLURM_JOB_ID"), "nodes": os.environ.get("SLURM_JOB_NODELIST")}
    )
    return Verdict("go", str(number)), number


def end(folder: Path, exit_code: int) -> Verdict:
    """What to do after this launcher's attempt (YOCO_ATTEMPT, or the newest), which exited so. Records its end."""
    lines = attempts(folder)
    begun = [str(line["attempt"]) for line in lines if line["event"] == "begin"]
    mine = os.environ.get("YOCO_ATTEMPT")
    number = int(mine) if mine in begun else len(begun) - 1
    hung = [path for path in sorted((folder / "stacks" / str(number)).glob("*.txt")) if path.stat().st_size]
    verdict, kind = decide(outcomes(folder, number), [str(path) for path in hung], exit_code)
    if kind == "diverged" and _diverged_before(lines, newest_trained_steps(folder)):
        remedy = "lower --lr, use --guard-sigmas, or go on from an earlier checkpoint"
        verdict = Verdict("stop", f"{verdict.reason}; the second time from one checkpoint: {remedy}")
    checkpoint = tracked_iteration(folder / "checkpoints")
    line = {"event": "end", "attempt": number, "verdict": verdict.what, "kind": kind, "reason": verdict.reason}
    append_attempt(folder, line | {"exit_code": exit_code, "checkpoint": checkpoint, "time": time.time()})
    return verdict


def _diverged_before(lines: list[dict[str, Any]], trained: int | None) -> bool:
    """Whether the attempt before this one diverged, and neither has saved a step since."""
    ends = [line for line in lines if line["event"] == "end"]
    return bool(ends) and ends[-1]["kind"] == "diverged" and attempts_without_progress(lines, trained) > 1


def decide(outcomes: list[dict[str, Any]], hung: list[str], exit_code: int) -> tuple[Verdict, str]:
    """The verdict on one attempt and the kind of its outcome, from the records of its processes.

    Processes that want a requeue exit with 0, because torchrun and srun kill all others at the first non-zero code.

    Args:
        outcomes: records of the processes that could write one.
        hung: stack files of processes that the watchdog ended.
        exit_code: of srun or torchrun.
    """
    kinds = {one["kind"] for one in outcomes}
    kind = next((kind for kind in PRECEDENCE if kind in kinds), "crash")
    if kind in ("finished", "stopped", "requeue") and (exit_code or "crash" in kinds):
        kind = "crash"  # some processes ended as they should, another did not
    cause = _first_cause([one for one in outcomes if one["kind"] == kind])
    reason = cause or f"no process left a reason, exit {exit_code}"
    if kind == "crash" and hung:
        kind, reason = "hang", f"{len(hung)} processes hung; their Python stacks: {hung[0]}"
    if kind in ("finished", "stopped"):
        return Verdict("done", reason), kind
    if kind in ("user_error", "storage", "untrained"):
        return Verdict("stop", reason), kind
    suspects = sorted({one["host"] for one in outcomes if one["kind"] == "hardware" and one["suspect"]})
    return Verdict("requeue", reason, suspects), kind


def _first_cause(outcomes: list[dict[str, Any]]) -> str | None:
    """The earliest reason that is not a secondary failure."""
    outcomes = sorted(outcomes, key=lambda one: one["time"])
    causes = [one for one in outcomes if not SECONDARY_FAILURE.search(one["reason"])] or outcomes
    return f"{causes[0]['reason']} (rank {causes[0]['rank']} on {causes[0]['host']})" if causes else None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("when", choices=["begin", "end"])
    parser.add_argument("folder", type=Path, help="the run folder")
    parser.add_argument("--max-restarts", type=int, default=3, help="restarts without a new trained step (default 3)")
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
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path in a reason may be no text
    try:
        sys.exit(main(sys.argv[1:]))
    except (OSError, BadFile) as error:
        print(f"policy: error: the run folder cannot be used: {error}", file=sys.stderr)
        sys.exit(2)
