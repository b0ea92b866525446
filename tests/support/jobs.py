"""Runs as jobs: submitted with launch/slurm/submit.py, watched by what they leave in their folder."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from support.cli import STEP, TINY
from support.slurm import Cluster
from yoco_megatron.resilience import policy

ROOT = Path(__file__).parents[2]
STEPS = 80
# Long enough to be disturbed, and every figure of every step in the log.
FLAGS = [*TINY, "--train-iters", str(STEPS), "--num-workers", "0", "--save-interval", "20", "--log-interval", "1"]


QUICK = ("--no-check", "--no-preflight")


class Job:
    """One run folder, and the job that works on it."""

    def __init__(
        self, cluster: Cluster, folder: Path, *flags: str, nodes: int = 2, minutes: int = 10, options: tuple = QUICK
    ) -> None:
        self.cluster, self.folder = cluster, folder
        command = [sys.executable, str(ROOT / "launch/slurm/submit.py"), "--run-folder", str(folder)]
        command += ["--nodes", str(nodes), "--cluster", str(ROOT / "tests/launch/cluster.yaml"), "--time", str(minutes)]
        done = subprocess.run([*command, *options, *FLAGS, *flags], env=cluster.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        self.pending_since: float | None = None
        self.id = re.search(r"submitted job (\d+)", done.stdout).group(1)

    def state(self) -> str:
        return self.cluster.queue().get(self.id, ("PENDING", ""))[0]

    def nodes(self) -> list[str]:
        return self.cluster.names(self.cluster.queue()[self.id][1])

    def hurry(self) -> None:
        """A requeued job waits for its old credential to expire; another second than its own would do."""
        if self.state() != "PENDING":
            self.pending_since = None
        elif self.pending_since is None:
            self.pending_since = time.monotonic()
        elif time.monotonic() - self.pending_since > 2:
            self.pending_since = None
            with contextlib.suppress(AssertionError):  # it has just been started
                self.cluster("scontrol", "update", f"jobid={self.id}", "StartTime=now")

    def wait_for_step(self, step: int, attempt: int) -> None:
        def reached() -> bool:
            self.hurry()
            beat = self.heartbeat()
            return beat["iteration"] >= step and beat["attempt"] == str(attempt)

        self.wait(reached, f"step {step} of attempt {attempt}")

    def wait_for_end(self) -> str:
        def ended() -> bool:
            self.hurry()
            return self.state() in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        self.wait(ended, "the end of the job")
        return self.state()

    def wait(self, condition, what: str) -> None:
        try:
            Cluster.wait(condition, 600, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.report()}") from None

    def log(self) -> str:
        """What the batch script said, over all attempts."""
        path = self.folder / f"logs/job-{self.id}.log"
        return path.read_text() if path.exists() else ""

    def status(self) -> dict:
        """What status.py says."""
        command = [sys.executable, str(ROOT / "launch/slurm/status.py"), str(self.folder), "--json"]
        done = subprocess.run(command, env=self.cluster.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0]

    def report(self) -> str:
        logs = sorted(self.folder.glob("logs/**/*.log"))
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in logs)

    def asked_to_leave(self) -> bool:
        return "asking the run to save and leave" in self.log()

    def heartbeat(self) -> dict:
        path = self.folder / "heartbeat.json"
        return json.loads(path.read_text()) if path.exists() else {"iteration": 0, "attempt": None}

    def begins(self) -> list[dict]:
        """The begin lines of attempts.jsonl."""
        return [line for line in policy.attempts(self.folder) if line["event"] == "begin"]

    def ends(self) -> list[dict]:
        """The end lines of attempts.jsonl."""
        return [line for line in policy.attempts(self.folder) if line["event"] == "end"]

    def attempts(self) -> int:
        return len(self.begins())

    def checkpoint(self) -> int:
        return int((self.folder / "checkpoints/latest_checkpointed_iteration.txt").read_text())

    def losses(self) -> dict[int, set[str]]:
        """Step -> the losses that were printed for it, over all attempts; more than one where attempts disagree."""
        found: dict[int, set[str]] = {}
        for attempt in self.folder.glob("logs/[0-9]*"):
            text = "".join(path.read_text() for path in attempt.rglob("*") if path.is_file())
            steps = re.findall(rf"{STEP} .*? lm loss (\S+) ", text)
            for step, loss in steps:
                found.setdefault(int(step), set()).add(loss)
        return found

    def trainers(self) -> list[psutil.Process]:
        """The training processes themselves, by rank."""
        ours = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            words, environ = process.info["cmdline"] or [], process.info["environ"] or {}
            if "pretrain_yoco.py" in words and "torch.distributed.run" not in words and str(self.folder) in words:
                ours.append((int(environ.get("RANK", -1)), process.pid, process))
        of_rank: dict[int, psutil.Process] = {}
        for rank, _, process in sorted(ours, key=lambda one: one[:2]):
            of_rank.setdefault(rank, process)  # the first of a rank; its helpers come later
        return [process for rank, process in sorted(of_rank.items()) if rank >= 0]

    def kill(self, rank: int) -> None:
        os.kill(self.trainers()[rank].pid, signal.SIGKILL)
