"""launch/cpu.sh (and so local.sh) and status.py as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.cli import TINY

from yoco_megatron.resilience import policy

ROOT = Path(__file__).parents[2]


def status(run: Path) -> dict:
    command = [sys.executable, str(ROOT / "launch/slurm/status.py"), str(run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[0]


def cpu(run: Path, *flags: str) -> subprocess.Popen:
    command = ["bash", str(ROOT / "launch/cpu.sh"), str(run), "--nproc", "2", "--", *TINY, "--num-workers", "0", *flags]
    env = os.environ | {"PYTHON": sys.executable}
    # Tests that run in a shell's background inherit an ignored Ctrl-C, which bash could not trap.
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, preexec_fn=heeding
    )


@pytest.mark.slow
def test_interrupted_then_finished(tmp_path):
    """Ctrl-C saves and stops; the same command goes on, and a third time there is nothing to do."""
    run = tmp_path / "a run"
    process = cpu(run, "--train-iters", "60", "--save-interval", "1000")
    end = time.monotonic() + 120
    while not any((run / "logs").glob("*")):  # torchrun is up, the first step seconds away
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "done the trigger file `exit`" in text
    stopped = status(run)
    assert stopped["state"] == "done" and 0 < stopped["last_checkpoint"] == stopped["step"] < 60
    text, _ = cpu(run, "--train-iters", "60", "--save-interval", "1000").communicate(timeout=240)
    assert "done all of --train-iters" in text, text[-2000:]
    finished = status(run)
    assert finished["step"] == finished["of"] == 60 and finished["restarts"] == 1
    assert finished["tokens"] == 60 * 8 * 32 and finished["tokens_per_second"] > 0
    text, _ = cpu(run).communicate(timeout=60)
    assert text.startswith("local.sh: done the run has finished; to train longer, remove ")


FOLLOW = """
source "$0"
(while [[ ! -e $MARK ]]; do sleep 0.02; done; exit 7) &
run=$!
trap 'touch "$MARK"; while kill -0 $run 2>/dev/null; do sleep 0.02; done' USR1
(sleep 0.3; kill -USR1 $$) &
follow $run
echo $rc
"""


def test_exit_code_of_a_run_that_ends_while_a_trap_runs(tmp_path):
    env = os.environ | {"MARK": str(tmp_path / "mark")}
    command = ["bash", "-c", FOLLOW, str(ROOT / "launch/lib/follow.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stdout + done.stderr


def test_status_of_no_run(tmp_path):
    command = [sys.executable, str(ROOT / "launch/slurm/status.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no attempts.jsonl" in done.stderr


def test_status_of_a_job_that_waits(tmp_path):
    """The command that submit.py ends by."""
    (tmp_path / "submitted.txt").write_text("4242\n")
    found = status(tmp_path)
    assert found["state"].startswith("submitted") and found["job"] == "4242" and found["step"] is None


def test_status_of_a_run_that_waits_again(tmp_path, monkeypatch):
    """Its last job has ended, and a newer one is in the queue."""
    (tmp_path / "squeue").write_text("#!/bin/sh\n[ $3 = 7 ] && echo 'PENDING|1:00:00'\nexit 0\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    policy.begin(tmp_path, 3)
    policy.end(tmp_path, 1)
    (tmp_path / "submitted.txt").write_text("6\n")
    assert not status(tmp_path)["state"].startswith("submitted") and status(tmp_path)["job"] == "6"
    (tmp_path / "submitted.txt").write_text("7\n")
    assert (status(tmp_path)["state"], status(tmp_path)["job"]) == ("submitted again, pending", "7")


def test_status_says_why(tmp_path):
    policy.begin(tmp_path, 3)
    assert status(tmp_path)["state"] == "running"
    policy.end(tmp_path, 137)
    found = status(tmp_path)
    assert found["state"] == "waiting to restart" and "exit 137" in found["reason"] and found["step"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--nprocs", "2"], "unknown option --nprocs"), (["--nproc"], "--nproc needs a number")],
)
def test_mistakes(words, message):
    done = subprocess.run(["bash", str(ROOT / "launch/local.sh"), "run", *words], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_no_python(tmp_path):
    env = os.environ | {"PYTHON": str(tmp_path / "python")}
    command = ["bash", str(ROOT / "launch/local.sh"), str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("make env, or set PYTHON\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["demo.sh", "blend.sh"])
def test_flag_is_no_folder(script, tmp_path):
    command = ["bash", str(ROOT / "launch" / script), "--halp"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "unknown option --halp" in done.stderr
