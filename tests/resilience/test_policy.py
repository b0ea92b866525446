"""What happens after an attempt: the whole exit policy on folders as attempts leave them."""

import json
from pathlib import Path

import pytest

from yoco_megatron.checkpoint import layout
from yoco_megatron.resilience import exit_record, policy
from yoco_megatron.resilience.exit_record import Outcome


def saved(run: Path, iteration: int, trained: int | None = None) -> None:
    checkpoint = layout.path_of(run / "checkpoints", iteration)
    checkpoint.mkdir(parents=True, exist_ok=True)
    if trained is not None:
        (checkpoint / layout.TRAINED).write_text(str(trained))
    layout.write_tracker(run / "checkpoints", iteration)


def said(run: Path, attempt: int, monkeypatch, *outcomes: Outcome) -> None:
    monkeypatch.setenv("YOCO_ATTEMPT", str(attempt))
    for rank, one in enumerate(outcomes):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("SLURMD_NODENAME", f"node{rank}")
        exit_record.record(run, one)


FINISHED, REQUEUE = Outcome("finished", 0, "all"), Outcome("requeue", 0, "signal")
CRASH = Outcome("crash", 1, "RuntimeError: boom")
SECONDARY = Outcome("crash", 1, "RuntimeError: NCCL error: remote process exited")


@pytest.mark.parametrize(
    ("outcomes", "exit_code", "verdict", "kind"),
    [
        ([FINISHED, FINISHED], 0, "done", "finished"),
        ([REQUEUE, REQUEUE], 0, "requeue", "requeue"),
        ([Outcome("stopped", 0, "trigger")] * 2, 0, "done", "stopped"),
        ([Outcome("user_error", 2, "--lr is missing"), SECONDARY], 1, "stop", "user_error"),
        ([SECONDARY, Outcome("storage", 74, "No space left on device")], 1, "stop", "storage"),
        ([Outcome("rolled_back", 0, "back to 10")] * 2, 0, "requeue", "rolled_back"),
        ([Outcome("diverged", 17, "step 3")] * 2, 17, "requeue", "diverged"),
        ([Outcome("untrained", 1, "no step")] * 2, 1, "stop", "untrained"),
        ([SECONDARY, CRASH], 1, "requeue", "crash"),
        ([], 137, "requeue", "crash"),
        ([FINISHED], 137, "requeue", "crash"),  # the other process was killed
        ([FINISHED, CRASH], 1, "requeue", "crash"),
    ],
)
def test_verdict(tmp_path, monkeypatch, outcomes, exit_code, verdict, kind):
    assert policy.begin(tmp_path, 3)[0].what == "go"
    said(tmp_path, 0, monkeypatch, *outcomes)
    found = policy.end(tmp_path, exit_code)
    assert (found.what, policy.attempts(tmp_path)[-1]["kind"]) == (verdict, kind)
    assert found.exclude == []


def test_cause_is_not_a_secondary_failure(tmp_path, monkeypatch):
    policy.begin(tmp_path, 3)
    said(tmp_path, 0, monkeypatch, SECONDARY, CRASH)
    assert policy.end(tmp_path, 1).reason == "RuntimeError: boom (rank 1 on node1)"


def test_only_the_suspect_node_is_excluded(tmp_path, monkeypatch):
    policy.begin(tmp_path, 3)
    innocent = Outcome("hardware", 17, "rerun")
    said(tmp_path, 0, monkeypatch, innocent, Outcome("hardware", 17, "rerun", suspect=True), innocent)
    found = policy.end(tmp_path, 17)
    assert (found.what, found.exclude) == ("requeue", ["node1"])


def test_hang_is_seen_by_its_stacks(tmp_path, monkeypatch):
    policy.begin(tmp_path, 3)
    (tmp_path / "stacks/0").mkdir(parents=True)
    (tmp_path / "stacks/0/0.txt").write_text("")
    (tmp_path / "stacks/0/1.txt").write_text("Thread 0x1: ...")
    found = policy.end(tmp_path, 142)
    assert found.what == "requeue" and "1 processes hung" in found.reason and "1.txt" in found.reason


def test_crash_loop(tmp_path):
    """Three attempts from one checkpoint, of which each counts, whether or not it could note its end."""
    saved(tmp_path, 10)
    assert policy.begin(tmp_path, 2)[0].what == "go"
    assert policy.end(tmp_path, 1).what == "requeue"
    assert policy.begin(tmp_path, 2)[0].what == "go"  # and the node is lost
    assert policy.begin(tmp_path, 2)[0].what == "go"
    assert policy.end(tmp_path, 1).what == "requeue"
    stop = policy.begin(tmp_path, 2)[0]
    assert stop.what == "stop" and "3 attempts in a row" in stop.reason and "iteration 10" in stop.reason
    saved(tmp_path, 20)  # someone has repaired it
    assert policy.begin(tmp_path, 2)[0].what == "go"


def test_last_reason_is_of_the_last_attempt(tmp_path):
    """Which may have left none: then it is not the reason of one before."""
    policy.begin(tmp_path, 0)
    policy.end(tmp_path, 1)
    assert "no process left a reason, exit 1" in policy.begin(tmp_path, 0)[0].reason
    (tmp_path / "attempts.jsonl").unlink()
    policy.begin(tmp_path, 1)
    policy.end(tmp_path, 1)
    policy.begin(tmp_path, 1)  # and its node is lost
    assert "the last reason: it left none" in policy.begin(tmp_path, 1)[0].reason


def test_progress_resets_the_count(tmp_path):
    for step in range(10):
        saved(tmp_path, step)
        assert policy.begin(tmp_path, 0)[0].what == "go"
        assert policy.end(tmp_path, 1).what == "requeue"


def test_checkpoints_without_a_trained_step_are_no_progress(tmp_path):
    """The guard skips every step, and the run saves all the same."""
    for step in (10, 12, 14):
        saved(tmp_path, step, trained=10)
        assert policy.begin(tmp_path, 2)[0].what == "go"
        assert policy.end(tmp_path, 0).what == "requeue"
    saved(tmp_path, 16, trained=10)
    assert policy.begin(tmp_path, 2)[0].what == "stop"
    saved(tmp_path, 16, trained=11)
    assert policy.begin(tmp_path, 2)[0].what == "go"


def test_second_divergence_from_one_checkpoint_stops(tmp_path, monkeypatch):
    diverged = Outcome("diverged", 17, "diverged in step 12: found NaN")
    saved(tmp_path, 10)
    for attempt, verdict in enumerate(("requeue", "stop")):
        policy.begin(tmp_path, 3)
        said(tmp_path, attempt, monkeypatch, diverged, diverged)
        assert policy.end(tmp_path, 17).what == verdict
    policy.begin(tmp_path, 3)
    saved(tmp_path, 20)
    said(tmp_path, 2, monkeypatch, diverged, diverged)
    assert policy.end(tmp_path, 17).what == "requeue", "it came further before"


def test_end_is_of_its_own_attempt(tmp_path, monkeypatch):
    """Another launcher may have begun one in the same folder since."""
    policy.begin(tmp_path, 3)
    policy.begin(tmp_path, 3)
    said(tmp_path, 1, monkeypatch, Outcome("user_error", 2, "in use"))
    said(tmp_path, 0, monkeypatch, FINISHED)
    assert policy.end(tmp_path, 0).what == "done"
    assert policy.attempts(tmp_path)[-1]["attempt"] == 0
    monkeypatch.delenv("YOCO_ATTEMPT")
    assert policy.end(tmp_path, 0).what == "stop", "the newest, where a launcher does not say which"


def test_finished_is_not_started_again_but_stopped_may(tmp_path, monkeypatch):
    policy.begin(tmp_path, 3)
    said(tmp_path, 0, monkeypatch, Outcome("stopped", 0, "trigger"))
    policy.end(tmp_path, 0)
    assert policy.begin(tmp_path, 3) == (policy.Verdict("go", "1"), 1)
    said(tmp_path, 1, monkeypatch, FINISHED)
    policy.end(tmp_path, 0)
    assert policy.begin(tmp_path, 3)[0].what == "done"


@pytest.mark.filterwarnings("ignore:.*left out|.*passed over")
@pytest.mark.parametrize(
    "line",
    [b'{"event": "beg', b"1\n", b"{}\n", b'{"event": "end"}\n', b'{"event": "begin", "attempt": ""}', b"\xff\n"],
)
def test_damaged_line_is_left_out(line, tmp_path):
    """And what is appended to it, where it was cut short, is a line of its own."""
    policy.begin(tmp_path, 3)
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(line)
    assert len(policy.attempts(tmp_path)) == 1
    assert policy.end(tmp_path, 1).what == "requeue"
    assert [one["event"] for one in policy.attempts(tmp_path)] == ["begin", "end"]


@pytest.mark.filterwarnings("ignore:.*left out|.*passed over")
@pytest.mark.parametrize("content", [b"", b'{"ki', b"{}", b"[]", b'{"kind": "finished"}', b"\xff", b"[" * 100000, None])
def test_damaged_outcome_is_passed_over(content, tmp_path, monkeypatch):
    policy.begin(tmp_path, 3)
    said(tmp_path, 0, monkeypatch, Outcome("user_error", 2, "--lr is missing"), FINISHED)
    path = tmp_path / "outcomes/0/1.json"
    path.unlink()
    path.symlink_to("/dev/zero") if content is None else path.write_bytes(content)
    assert policy.end(tmp_path, 2) == policy.Verdict("stop", "--lr is missing (rank 0 on node0)")


@pytest.mark.parametrize("content", [b"\x80\xff", "²".encode(), b"-1", b"9" * 5000, b""])
def test_damaged_tracker_stands_for_no_checkpoint(content, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").write_bytes(content)
    assert policy.begin(tmp_path, 3)[0].what == "go"
    assert policy.attempts(tmp_path)[0]["checkpoint"] is None


def test_command_line(tmp_path, capsys):
    assert policy.main(["begin", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "go 0\n"
    assert policy.main(["end", str(tmp_path), "--exit-code", "137"]) == 0
    assert capsys.readouterr().out.startswith("requeue no process left a reason, exit 137")


def test_storage_error_is_found_however_it_is_wrapped():
    full = OSError(28, "No space left on device")
    assert exit_record.of_exception(full).kind == "storage"
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = full
    assert exit_record.of_exception(wrapped).kind == "storage"
    from torch.distributed.checkpoint.api import CheckpointException

    assert exit_record.of_exception(CheckpointException("write", {0: (full, None)})).kind == "storage"
    assert exit_record.of_exception(RuntimeError("boom")).kind == "crash"
    assert exit_record.of_exception(FileNotFoundError(2, "x")).kind == "crash"
    assert exit_record.of_exception(IsADirectoryError(21, "x")).kind == "user_error"


def test_outcomes_hold_no_more_than_json(tmp_path, monkeypatch):
    said(tmp_path, 0, monkeypatch, CRASH)
    found = json.loads((tmp_path / "outcomes/0/0.json").read_text())
    assert found["host"] == "node0" and found["rank"] == 0 and found["reason"] == "RuntimeError: boom"


def test_records_of_an_earlier_attempt_with_the_same_number_do_not_count(tmp_path, monkeypatch):
    """Attempts are counted from 0 again when attempts.jsonl was removed, as the policy itself advises."""
    policy.begin(tmp_path, 3)
    said(tmp_path, 0, monkeypatch, FINISHED, Outcome("user_error", 2, "--lr is missing"))
    assert policy.end(tmp_path, 1).what == "stop"
    (tmp_path / "attempts.jsonl").unlink()
    policy.begin(tmp_path, 3)
    said(tmp_path, 0, monkeypatch, FINISHED)  # on fewer processes
    assert policy.end(tmp_path, 0).what == "done"
    verdict, _ = policy.begin(tmp_path, 3)
    assert verdict.what == "done" and str(tmp_path / "attempts.jsonl") in verdict.reason
