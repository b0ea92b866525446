"""Upcycling of a small model: the stages of a case follow each other, and what is evaluated is told."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import upcycling
from support.event_files import losses, write
from support.teachers import save_teacher, small_teacher

from yoco_megatron.evaluation.run_curves import VALIDATION


def options_of(tmp_path: Path) -> Namespace:
    return Namespace(
        folder=tmp_path, cases=["teacher", "window_3", "scratch"], tokens=25600.0, transfer=0.25, distil=0.25,
        length=64, longest=256, window=32, batch_tokens=256, micro_batch_size=16, loss_chunk_size=64, gpus=0,
        runs_per_gpu=1, eval_iters=1, flags="", record=True, output=tmp_path / "rows.jsonl",
        picture=tmp_path / "losses.svg",
    )  # fmt: skip


def flag(job: upcycling.Job, name: str) -> str | None:
    return job.flags[job.flags.index(name) + 1] if name in job.flags else None


def test_stages_follow_each_other(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    assert [job.name for job in upcycling.next_jobs(options)] == ["teacher_plain", "window_3_transfer", "scratch_plain"]
    teacher, transfer, distil, plain, scratch = (
        job for case in options.cases for job in upcycling.jobs_of(case, options)
    )
    assert (teacher.steps, distil.steps, plain.steps, scratch.steps) == (100, 25, 50, 100)
    assert transfer.steps == 100 and flag(transfer, "--global-batch-size") == "1", "a quarter of the batch of 4"
    assert "--attention-transfer" in transfer.flags and "--attention-transfer" not in distil.flags
    assert flag(transfer, "--teacher") == flag(distil, "--teacher") == str(tmp_path / "teacher")
    assert flag(teacher, "--teacher") is None and flag(scratch, "--teacher") is None
    assert flag(plain, "--teacher") is None
    assert flag(transfer, "--pretrained-checkpoint") == str(upcycling.start_of("window_3", options))
    assert flag(distil, "--pretrained-checkpoint") == str(transfer.folder / "checkpoints")
    assert flag(plain, "--pretrained-checkpoint") == str(distil.folder / "checkpoints")
    assert flag(scratch, "--pretrained-checkpoint") is None
    transfer.folder.mkdir(parents=True)
    (transfer.folder / "done").touch()
    assert [job.name for job in upcycling.next_jobs(options)] == [
        "teacher_plain", "window_3_transfer", "window_3_distil", "scratch_plain"
    ]  # fmt: skip


def evaluated(checkpoint: Path, loss: float) -> None:
    upcycling.output_of(checkpoint).mkdir(parents=True)
    found = {"tasks": {"held_out": {"metrics": {"loss": loss}}}}
    (upcycling.output_of(checkpoint) / "results.json").write_text(json.dumps(found))


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what a case has left without its checkpoints; then only the other cases are trained."""
    pytest.importorskip("matplotlib")
    options = options_of(tmp_path)
    with pytest.raises(SystemExit, match="nothing is evaluated"):
        upcycling.report(options)
    *_, last = upcycling.jobs_of("window_3", options)
    write(last.folder / "tensorboard", 1000.0, [*losses(1, 10), (VALIDATION, 10, 10.5, 2.6)])
    (last.folder / "done").touch()
    assert [job.name for job in upcycling.next_jobs(options)] == ["teacher_plain", "scratch_plain"]
    evaluated(last.folder / "checkpoints", 2.5)
    evaluated(upcycling.start_of("window_3", options), 3.5)
    small_teacher("llama").config.save_pretrained(tmp_path / "teacher")
    measured = {name: {"64": {"cache bytes": size}} for name, size in (("teacher", 80), ("window_3", 20))}
    (tmp_path / upcycling.MEASURED).write_text(json.dumps(measured | {"device": "CPU"}))
    upcycling.report(options)
    out = capsys.readouterr().out
    assert "model | cache bytes at 64 | cache bytes at 64, share | held_out loss | held_out loss, start" in out
    assert "window_3 | 20 | 0.25 | 2.5 | 3.5" in out
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    assert "window_3" in options.picture.read_text()
    assert [(row["metric"], row["value"]) for row in rows if row["case"].startswith("window_3")] == [
        ("cache bytes at 64", 20.0),
        ("cache bytes at 64, share", 0.25),
        ("held_out loss", 2.5),
        ("held_out loss, start", 3.5),
    ]


def test_prefill_and_cache_are_measured(tmp_path: Path) -> None:
    """A YOCO of one set and windows of 64: one layer's K,V, and windows, instead of six layers' K,V."""
    import upcycled_prefill

    save_teacher("llama", tmp_path / "teacher", head_dim=16, max_position_embeddings=8192)
    options, file = options_of(tmp_path), tmp_path / "measured.json"
    students = {"window_1": upcycling.shape_of("window_1", options)}
    upcycled_prefill.measure(tmp_path / "teacher", students, [4096], file, cuda=False)
    found = {name: one["4096"] for name, one in json.loads(file.read_text()).items() if name != "device"}
    layer = 4096 * 2 * 2 * 16 * 2
    assert found["teacher"]["cache bytes"] == 6 * layer
    assert layer <= found["window_1"]["cache bytes"] < 1.2 * layer and found["window_1"]["prefill seconds"] > 0
