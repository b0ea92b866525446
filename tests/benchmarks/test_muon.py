"""Muon against AdamW on real text: which runs are needed, and what is reported of them."""

import json
from argparse import Namespace
from pathlib import Path

import muon
import pytest
from paper_ordering import Case, job_of
from support.event_files import losses, write

from yoco_megatron.evaluation.run_curves import VALIDATION


def test_best_of_each_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = Namespace(
        folder=tmp_path, models=["retention"], rates=[1e-3, 1e-2], seeds=[1, 2], size="tiny", batch_tokens=128,
        length=32, tokens=1280, sweep_tokens=640, micro_batch_size=16, evaluations=10, gpus=0, device=None,
        split="80,20,0", flags="", record=True, output=tmp_path / "rows.jsonl", picture=tmp_path / "muon.svg",
    )  # fmt: skip
    sweep = muon.cases(options, {})
    assert sweep == [Case("retention", variant, rate, 1, 640) for rate in (1e-2, 1e-3) for variant in ("", "muon")]
    known = {case: case.rate if case.variant else 1 - case.rate for case in sweep}
    best = [case for case in muon.cases(options, known) if case not in sweep]
    assert best == [
        *(Case("retention", "", 1e-2, seed, 1280) for seed in (1, 2)),
        *(Case("retention", "muon", 1e-3, seed, 1280) for seed in (1, 2)),
    ]
    for case in [*sweep, *best]:
        job = job_of(case, options)
        assert ("configs/optimizer/muon.yaml" in job.flags) == (case.variant == "muon")
        value = known.get(case, 1.0 if case.variant else 1.5)
        points = [*losses(1, job.steps), (VALIDATION, job.steps, job.steps + 0.5, value)]
        write(job.folder / "tensorboard", 1000.0, points)
        (job.folder / "done").touch()
    muon.report(options)
    assert "best YOCO, gated retention, Muon, lr 0.001: 1.0000, mean of 2 seeds" in capsys.readouterr().out
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    assert [(row["value"], row["peer_value"]) for row in rows if row["peer"]] == [(1.0, 1.5)]
    assert len(rows) == 8 * 2 + 1 and options.picture.exists()
