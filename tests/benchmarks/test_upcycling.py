"""Upcycling of a small model: the stages of a case follow each other, and what is evaluated is told."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import upcycling
from support.event_files import losses, write

from yoco_megatron.evaluation.run_curves import VALIDATION


def options_of(tmp_path: Path) -> Namespace:
    return Namespace(
        folder=tmp_path, cases=["teacher", "window_3", "scratch"], tokens=12800.0, transfer=0.25, length=64,
        longest=256, window=32, batch_tokens=128, micro_batch_size=16, gpus=0, eval_iters=1, flags="", record=True,
        output=tmp_path / "rows.jsonl", picture=tmp_path / "losses.svg",
    )  # fmt: skip


def flag(job: upcycling.Job, name: str) -> str | None:
    return job.flags[job.flags.index(name) + 1] if name in job.flags else None


def test_stages_follow_each_other(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    assert [job.name for job in upcycling.next_jobs(options)] == ["teacher_plain", "window_3_transfer", "scratch_plain"]
    teacher, transfer, distil, scratch = (job for case in options.cases for job in upcycling.jobs_of(case, options))
    assert (teacher.steps, transfer.steps + distil.steps, scratch.steps) == (100, 100, 100) and transfer.steps == 25
    assert "--attention-transfer" in transfer.flags and "--attention-transfer" not in distil.flags
    assert flag(transfer, "--teacher") == flag(distil, "--teacher") == str(tmp_path / "teacher")
    assert flag(teacher, "--teacher") is None and flag(scratch, "--teacher") is None
    assert flag(distil, "--pretrained-checkpoint") == str(transfer.folder / "checkpoints")
    assert flag(scratch, "--pretrained-checkpoint") is None
    transfer.folder.mkdir(parents=True)
    (transfer.folder / "done").touch()
    assert [job.name for job in upcycling.next_jobs(options)] == [
        "teacher_plain", "window_3_transfer", "window_3_distil", "scratch_plain"
    ]  # fmt: skip


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(upcycling, "cache_share", lambda case, options: {"window_3": 0.25}[case])
    options = options_of(tmp_path)
    with pytest.raises(SystemExit, match="nothing is evaluated"):
        upcycling.report(options)
    last = upcycling.jobs_of("window_3", options)[-1]
    write(last.folder / "tensorboard", 1000.0, [*losses(1, 10), (VALIDATION, 10, 10.5, 2.6)])
    (last.folder / "done").touch()
    checkpoint = upcycling.checkpoints(options)["window_3"]
    found = {"tasks": {"held_out": {"metrics": {"loss": 2.5}}}}
    upcycling.output_of(checkpoint).mkdir(parents=True)
    (upcycling.output_of(checkpoint) / "results.json").write_text(json.dumps(found))
    upcycling.report(options)
    assert "window_3 | 0.25 | 2.5" in capsys.readouterr().out
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    assert "window_3" in options.picture.read_text()
    assert [(row["metric"], row["value"]) for row in rows] == [
        ("held_out loss", 2.5),
        ("cache share of the teacher's", 0.25),
    ]
