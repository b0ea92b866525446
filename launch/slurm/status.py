"""Status of runs, from their run folders (and squeue, if available).

python launch/slurm/status.py RUN [RUN ...] [--json] [--watch SECONDS]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.resilience import policy, run_folder
from yoco_megatron.utils.small_files import BadFile, read_json, read_text

STALE_S = 600  # a heartbeat older than this is reported
GONE = "not in the queue"


def squeue(job: str | None) -> tuple[str | None, str | None]:
    """(state, time left) of a job from SLURM; state `GONE` if it has ended, (None, None) without SLURM."""
    if not job:
        return None, None
    try:
        done = subprocess.run(["squeue", "-h", "-j", job, "-o", "%T|%L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None, None
    state, _, left = done.stdout.strip().partition("|")
    return state or GONE, left or None


class Heartbeat(TypedDict):
    """What is read of heartbeat.json."""

    iteration: int
    train_iters: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    time: float


def heartbeat(run: Path) -> dict[str, Any] | None:
    """The newest; None without one. One that is damaged counts as {}, with a warning: the next one replaces it."""
    try:
        return read_json(run / "heartbeat.json", Heartbeat, missing=None)
    except BadFile as error:
        print(f"status.py: warning: {error}", file=sys.stderr)
        return {}


def unknown(run: Path, state: str, job: str | None) -> dict[str, Any]:
    """The status of a run of which nothing else is known."""
    nothing = ("step", "of", "tokens", "loss", "tokens_per_second", "last_checkpoint")
    later = ("seconds_to_finish", "job_time_left", "heartbeat_age")
    head = {"run": str(run), "state": state, "reason": "", "job": job}
    return head | dict.fromkeys(nothing) | {"restarts": 0} | dict.fromkeys(later)


def submitted(run: Path) -> str | None:
    """The job that submit.py submitted last, if any. Raises ValueError for a file of something else."""
    try:
        text = read_text(run / run_folder.SUBMITTED, 1000, missing=None)
    except BadFile as error:
        raise ValueError(str(error)) from None
    return text and text.strip()


def read(run: Path) -> dict[str, Any]:
    """The status of one run. Raises ValueError for a folder that is not a run folder."""
    lines, beat, newest = policy.attempts(run), heartbeat(run), submitted(run)
    if not lines and beat is None and newest:
        queued, _ = squeue(newest)
        return unknown(run, "submitted" if queued is None else f"submitted, {queued.lower()}", newest)
    if not lines and beat is None:
        raise ValueError(f"{run}: no attempts.jsonl and no heartbeat.json there; give a --run-folder")
    begins = [line for line in lines if line["event"] == "begin"]
    last = lines[-1] if lines else {"event": "begin"}
    job = begins[-1].get("job") if begins else os.environ.get("SLURM_JOB_ID")
    slurm_state, left = squeue(job)
    if last["event"] == "begin":
        state = "running" if slurm_state in (None, "RUNNING") else slurm_state.lower()
    else:
        waiting = f"stopped, {GONE}" if slurm_state == GONE else "waiting to restart"
        state = {"requeue": waiting, "done": "done", "stop": "stopped"}[last["verdict"]]
        again, _ = squeue(newest if newest != job else None)
        if again not in (None, GONE):
            state, job = f"submitted again, {again.lower()}", newest
    beat = beat or {}
    age = time.time() - beat["time"] if beat else None
    if state == "running" and age is not None and age > STALE_S:
        state = f"running, but no step for {age / 60:.0f} minutes"
    remaining = None
    if beat.get("tokens_per_second") and beat["iteration"]:
        per_step = beat["tokens"] / beat["iteration"]
        remaining = (beat["train_iters"] - beat["iteration"]) * per_step / beat["tokens_per_second"]
    return unknown(run, state, job) | {
        "reason": last.get("reason", ""),
        "step": beat.get("iteration"),
        "of": beat.get("train_iters"),
        "tokens": beat.get("tokens"),
        "loss": beat.get("loss"),
        "tokens_per_second": beat.get("tokens_per_second"),
        "last_checkpoint": checkpoints.tracked_iteration(run / "checkpoints"),
        "restarts": max(0, len(begins) - 1),
        "seconds_to_finish": remaining,
        "job_time_left": left,
        "heartbeat_age": age,
    }


def table(status: dict[str, Any]) -> str:
    """The status of one run as a few lines of text."""

    def number(value: Any, form: str = ",") -> str:
        return "-" if value is None else format(value, form)

    finish = status["seconds_to_finish"]
    rows = {
        "state": status["state"] + (f": {status['reason']}" if status["reason"] else ""),
        "job": f"{status['job'] or '-'}, time left {status['job_time_left'] or '-'}",
        "step": f"{number(status['step'])} of {number(status['of'])}",
        "tokens": number(status["tokens"]),
        "loss": number(status["loss"], ".4f"),
        "tokens/s": number(status["tokens_per_second"], ",.0f"),
        "to finish": "-" if finish is None else f"{finish / 3600:.1f} hours of training",
        "checkpoint": f"iteration {number(status['last_checkpoint'])}",
        "restarts": number(status["restarts"]),
        "heartbeat": "-" if status["heartbeat_age"] is None else f"{status['heartbeat_age']:.0f} s ago",
    }
    return "\n".join([status["run"], *(f"  {name:<11}{value}" for name, value in rows.items())])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a --run-folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="repeat at this interval")
    args = parser.parse_args(argv)
    while True:
        all_of_them = [read(run) for run in args.runs]
        print(json.dumps(all_of_them, indent=1) if args.json else "\n".join(map(table, all_of_them)), flush=True)
        if not args.watch:
            return 0
        time.sleep(args.watch)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"status.py: error: {error}", file=sys.stderr)
        sys.exit(2)
