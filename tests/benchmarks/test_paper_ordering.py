"""The comparison on real text: which runs are needed, how they share GPUs and time, and what is reported of them."""

import json
import time
from argparse import Namespace
from pathlib import Path

import paper_ordering
import pytest
import site_text
import slices
from paper_ordering import Case, cases
from slices import Job
from support.event_files import losses, write

from yoco_megatron.evaluation.run_curves import VALIDATION


def options_of(tmp_path: Path) -> Namespace:
    return Namespace(
        folder=tmp_path, models=list(paper_ordering.CONFIGS), rates=[1e-4, 1e-3, 1e-2], seeds=[1, 2], size="tiny",
        batch_tokens=128, length=32, tokens=2560, sweep_tokens=1280, micro_batch_size=16, evaluations=10, gpus=0,
        device=None, split="80,20,0", flags="", record=True, output=tmp_path / "rows.jsonl",
        picture=tmp_path / "ordering.svg",
    )  # fmt: skip


def test_results_decide_what_else_is_trained(tmp_path: Path) -> None:
    sweep = cases(options_of(tmp_path), {})
    assert len(sweep) == 3 * 3 + 3
    assert [case.model for case in sweep[:3]] == ["retention", "window", "transformer"]
    assert {case.rate for case in sweep[:3]} == {1e-3}  # the middle first
    # Lowest at 1e-2; the Transformer with Megatron's initialisation at 1e-4; the window is not done.
    known = {case: 3 - 10 * case.rate for case in sweep if case.model == "retention"}
    known |= {
        case: 3 - case.rate - 2 * (case[1:3] == ("megatron-init", 1e-4)) for case in sweep if case.model[0] == "t"
    }
    more = [case for case in cases(options_of(tmp_path), known) if case not in sweep]
    assert more[:3] == [  # the sweep's first, then all models once before the second seeds
        Case("retention", "unscaled", 1e-2, 1, 1280),
        Case("retention", "", 1e-2, 1, 2560),
        Case("transformer", "megatron-init", 1e-4, 1, 2560),
    ]
    assert more[3:] == [Case("retention", "", 1e-2, 2, 2560), Case("transformer", "megatron-init", 1e-4, 2, 2560)]
    alike = options_of(tmp_path)
    alike.tokens = alike.sweep_tokens  # what the sweep has trained is not trained again
    assert len(cases(alike, known)) == len(sweep) + 3


def test_slices_share_gpus_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Job(tmp_path / str(number), (), 1) for number in range(4)]
    seen: list[tuple[str, str | None]] = []

    def run(job: Job, gpu: str | None, end: float) -> bool:
        seen.append((job.name, gpu))
        time.sleep(0.05)
        job.folder.mkdir()
        (job.folder / "done").touch()
        return True

    monkeypatch.setattr(slices, "_run", run)
    # The fourth is known only when the first is done.
    assert slices.run_slice(lambda: made[:3] + made[3:] * made[0].done(), ["0", "1", "1"], slices.SHORTEST + 5)
    assert sorted(name for name, _ in seen) == ["0", "1", "2", "3"]
    assert {gpu for _, gpu in seen} == {"0", "1"}
    more = Job(tmp_path / "4", (), 1)
    assert not slices.run_slice(lambda: [more], ["0"], slices.SHORTEST)  # no time to begin
    monkeypatch.setattr(slices, "_run", lambda *_: False)
    with pytest.raises(SystemExit, match="failed: 4"):
        slices.run_slice(lambda: [more], [None], slices.SHORTEST + 5)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = options_of(tmp_path)

    def done(model: str, rate: float, tokens: float, loss: float) -> None:
        job = paper_ordering.job_of(Case(model, "", rate, 1, tokens), options)
        assert job.steps == tokens / 128
        middle = job.steps // 2
        points = [*losses(1, job.steps), (VALIDATION, middle, 0.5, loss), (VALIDATION, job.steps, 1.5, loss)]
        write(job.folder / "tensorboard", 1000.0, points)
        (job.folder / "done").touch()

    options.models = ["retention", "transformer"]
    for model, loss in (("retention", 1.5), ("transformer", 2.0)):
        for rate, more in ((1e-3, 0.0), (1e-4, 0.25), (1e-2, 0.5)):
            done(model, rate, 1280, loss + more)
    done("retention", 1e-3, 2560, 1.25)
    paper_ordering.report(options)  # in full length there is no Transformer yet
    assert "best YOCO, gated retention, lr 0.001, 1.28K tokens: 1.5000 (1.5000)" in capsys.readouterr().out
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    assert [(row["value"], row["peer_value"], row["ratio"]) for row in rows if row["peer"]] == [(1.5, 2.0, 1.3333)]
    assert len(rows) == 7 * 2 + 1  # a loss and a speed each, and the best beside the best
    assert options.picture.read_text().rstrip().endswith("</svg>")


def test_copies_are_left_out(tmp_path: Path) -> None:
    texts = ["a b", "c", "a  b\n", "d"]
    (tmp_path / "in").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    said = site_text.without_copies(tmp_path / "in", tmp_path / "out")
    assert [json.loads(line)["text"] for line in (tmp_path / "out").read_text().splitlines()] == ["a b", "c", "d"]
    assert "3 documents; 1 copies" in said
