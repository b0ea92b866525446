"""Length extension of a small model: documents that ask for what they told, stages in their order, and all of it."""

import random
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import length_extension
import pytest
from length_extension import Stage
from retrieval_text import document, pieces

ROOT = Path(__file__).resolve().parents[2]


def test_questions_have_the_answers_that_were_told() -> None:
    text = document(random.Random(3), pieces(["plain text " * 100], random.Random(4)), 60_000)
    assert 60_000 <= len(text) < 61_000
    fact = r"^The special magic (.+) number is (\d+) \. $"
    facts = {found[1]: (found.start(), found[2]) for found in re.finditer(fact, text, re.MULTILINE)}
    question = r"^What is the special magic (.+) number\? The special magic \1 number is  (\d+) \. $"
    questions = list(re.finditer(question, text, re.MULTILINE))
    assert len(facts) > 10 and len(questions) > 10
    for found in questions:
        told, number = facts[found[1]]
        assert told < found.start() and number == found[2]
    entries = re.findall(r"^(\w+ \w+: \d{10})$", text, re.MULTILINE)
    assert 5 < len(set(entries)) < len(entries)  # people are asked for as well


def test_a_stage_begins_where_the_one_before_ended(tmp_path: Path) -> None:
    options = Namespace(
        folder=tmp_path, models=["retention", "window:64"], size="tiny", retrieval=0.5, gpus=0, flags="",
        batch_tokens=256, micro_tokens=128,
        stages=[Stage.of("64:1e4:1e3:1e-3"), Stage.of("128:2e4:1e3:1e-4")],
    )  # fmt: skip
    assert [job.name for job in length_extension.jobs(options)] == ["retention_64", "window_64_64"]
    first = length_extension.jobs(options)[1]
    first.folder.mkdir(parents=True)
    (first.folder / "done").touch()
    retention, window, extended = length_extension.jobs(options)
    assert (retention.name, window.name, extended.name) == ("retention_64", "window_64_64", "window_64_128")
    flags = dict(zip(extended.flags, extended.flags[1:]))
    assert flags["--pretrained-checkpoint"] == str(first.folder / "checkpoints")
    assert (flags["--rotary-base"], flags["--self-decoder-window"], flags["--global-batch-size"]) == (
        "20000",
        "64",
        "2",
    )
    assert "--pretrained-checkpoint" not in window.flags


@pytest.mark.slow
def test_from_text_to_needles(tmp_path: Path) -> None:
    """Two stages of a tiny model, as a user runs them; what it has learnt is not the point."""
    flags = f"""--folder {tmp_path / "run"} --text docs --vocab-size 600 --size tiny --gpus 0 --models retention
        --stages 64:10000:1000:1e-3 512:8000:1000:1e-3 --batch-tokens 512 --shortest 400 --depths 2 --samples 1"""
    for what in ("prepare", "train", "evaluate"):
        command = [sys.executable, "benchmarks/length_extension.py", what, *flags.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.rstrip().endswith("all done")
    written = {path.name for path in (tmp_path / "run/runs/retention_512/evaluation").iterdir()}
    assert {"needle.json", "needle.svg", "multi_needle.json", "phonebook.json", "loss_by_position.json"} <= written
