"""Who may save to a folder: holders that live, die, come back, or are on other machines with other clocks."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from support.cli import TINY, run_script

from yoco_megatron.resilience import policy, run_folder, run_lock
from yoco_megatron.resilience.exit_record import InUse

HOLD = """
import sys, time
from argparse import Namespace
from yoco_megatron.resilience import run_lock
run_lock.BEAT_S = float(sys.argv[2])
run_lock.acquire(Namespace(save=sys.argv[1], run_folder=None))
print("held", flush=True)
time.sleep(60)
"""


def args_of(folder: Path) -> Namespace:
    return Namespace(save=str(folder), run_folder=None)


@pytest.fixture
def hold(tmp_path):
    """Starts another process that holds the lock of tmp_path."""
    processes = []

    def start(beat_s: float = 60.0) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path), str(beat_s)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n", processes[-1].stderr.read()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_S", 0.5)
    yield
    run_lock.release()


def elsewhere(folder: Path, age: float = 0.0, **entries: str) -> Path:
    """A lock that a process of another machine holds, last renewed `age` seconds ago."""
    path = folder / run_lock.NAME
    path.write_text(json.dumps(run_lock._me() | {"machine": "another", "job": "", **entries}))
    os.utime(path, times=(time.time() - age, time.time() - age))
    return path


def seconds_to_acquire(folder: Path) -> float:
    start = time.monotonic()
    run_lock.acquire(args_of(folder))
    assert json.loads((folder / run_lock.NAME).read_text())["pid"] == os.getpid()
    return time.monotonic() - start


def test_living_process_keeps_it_and_a_killed_one_does_not(hold, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_S", 1000.0)  # neither answer has to wait
    other = hold()
    with pytest.raises(
        InUse, match=rf"--save {tmp_path} is in use by .*process {other.pid}, since 20.*remove .*run.lock"
    ):
        run_lock.acquire(args_of(tmp_path))
    other.kill()  # nobody has waited for it: a zombie
    end = time.monotonic() + 20
    while run_lock._start_of(other.pid):
        assert time.monotonic() < end
        time.sleep(0.01)
    run_lock.acquire(args_of(tmp_path))


def test_pid_of_another_process_is_not_the_holder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_S", 1000.0)
    me = run_lock._me()
    (tmp_path / run_lock.NAME).write_text(json.dumps(me | {"pid": os.getppid(), "started": "1"}))
    run_lock.acquire(args_of(tmp_path))


def test_lock_of_another_machine_is_kept_while_it_is_renewed(hold, tmp_path, monkeypatch):
    hold(beat_s=0.05)
    me = run_lock._me()
    monkeypatch.setattr(run_lock, "_me", lambda: me | {"machine": "another"})
    with pytest.raises(InUse):
        run_lock.acquire(args_of(tmp_path))


@pytest.mark.parametrize("age", [0, -3600])
def test_lock_of_a_lost_machine_is_taken_when_it_is_stale(age, tmp_path):
    """-3600: of a clock that was an hour ahead; it must not keep the lock for an hour."""
    elsewhere(tmp_path, age)
    assert seconds_to_acquire(tmp_path) >= 0.4


def test_lock_that_is_stale_already_is_taken_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_S", 1000.0)
    elsewhere(tmp_path, age=1001)
    run_lock.acquire(args_of(tmp_path))


@pytest.mark.parametrize(
    ("entries", "env", "taken"),
    [
        ({"restart": "0"}, {"SLURM_RESTART_COUNT": "1"}, True),
        ({"attempt": "0"}, {"YOCO_ATTEMPT": "1"}, True),
        ({"attempt": "0"}, {}, False),  # two launchers in one allocation
        ({"job": "8"}, {"SLURM_RESTART_COUNT": "1"}, False),
    ],
)
def test_same_job_takes_over_at_once(entries, env, taken, tmp_path, monkeypatch):
    monkeypatch.delenv("YOCO_ATTEMPT", raising=False)
    elsewhere(tmp_path, **{"job": "7"} | entries)
    for name, value in {"SLURM_JOB_ID": "7", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run_lock, "STALE_S", 1000.0 if taken else 0.5)
    assert seconds_to_acquire(tmp_path) >= 0.4 or taken


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_damaged_lock_is_of_an_unknown_run_until_it_is_stale(content, tmp_path):
    (tmp_path / run_lock.NAME).write_text(content)
    assert seconds_to_acquire(tmp_path) >= 0.4


def test_process_whose_lock_was_taken_over_ends(hold, tmp_path):
    other = hold(beat_s=0.1)
    elsewhere(tmp_path, token="new")
    assert other.wait(timeout=20) == 2
    assert "was taken over by" in other.stderr.read()


def test_removed_lock_is_written_again(hold, tmp_path):
    other = hold(beat_s=0.05)
    (tmp_path / run_lock.NAME).unlink()
    end = time.monotonic() + 20
    while not (tmp_path / run_lock.NAME).exists():
        assert time.monotonic() < end and other.poll() is None
        time.sleep(0.01)


def test_release_removes_its_own_alone(tmp_path):
    run_lock.acquire(args_of(tmp_path))
    run_lock.acquire(args_of(tmp_path))  # again, by the same process
    run_lock.release()
    assert not (tmp_path / run_lock.NAME).exists()
    run_lock.acquire(args_of(tmp_path))
    path = elsewhere(tmp_path, token="new")
    run_lock.release()
    assert path.exists()


def test_second_run_is_refused_and_leaves_nothing(tmp_path):
    """By pretrain_yoco.py and by the launchers' policy; the first one's records stay as they are."""
    run_folder.make(tmp_path)
    (tmp_path / "tensorboard").mkdir()
    args = Namespace(run_folder=str(tmp_path), save=str(tmp_path / "checkpoints"))
    policy.begin(tmp_path, 3)
    run_lock.acquire(args)

    def found() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if not path.name.startswith("events."))  # an empty one

    before = found()
    (code, text), (other_code, _) = run_script(2, *TINY, "--run-folder", str(tmp_path))
    assert code == other_code == 2, "no process waits for one that was refused"
    assert text.splitlines()[-1].startswith(f"pretrain_yoco.py: error: --run-folder {tmp_path} is in use by")
    command = [sys.executable, "-m", "yoco_megatron.resilience.policy", "begin", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    assert said.startswith(f"stop {tmp_path / 'checkpoints'} is in use by")
    assert found() == before and len(policy.attempts(tmp_path)) == 1
