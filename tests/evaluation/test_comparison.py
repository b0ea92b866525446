"""Runs beside each other: the table's figures, and the tool that prints it."""

import json
import math
from pathlib import Path

import pytest
from support import tools
from support.event_files import TRANSFORMER, losses, write

from yoco_megatron.evaluation import pictures
from yoco_megatron.evaluation.comparison import compare, names_of, short
from yoco_megatron.evaluation.run_curves import VALIDATION, read_run
from yoco_megatron.utils.text_table import aligned

WIDE = TRANSFORMER | dict(num_layers=4)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A run of 100 steps, and one of 60 steps of a model that is about twice as large."""
    more = [(VALIDATION, 50, 50.5, 4.0), (VALIDATION, 100, 101.0, 2.0), ("evaluation/needle/accuracy", 100, 102.0, 0.5)]
    write(tmp_path / "sweep/small/tensorboard", 1000.0, [*losses(1, 100), *more])
    write(tmp_path / "sweep/large/tensorboard", 1000.0, losses(1, 60, value=1.0), flags=WIDE)
    return [tmp_path / "sweep/small", tmp_path / "sweep/large"]


def test_equal_tokens_and_equal_flops(runs: list[Path]) -> None:
    small, large = compare([read_run(run) for run in runs])
    assert small["equal_tokens"]["tokens"] == large["tokens"] == 60 * 4 * 32
    assert small["equal_tokens"]["training_loss"] == pytest.approx((1 / 59 + 1 / 60) / 2)
    assert small["equal_tokens"]["validation_loss"] == pytest.approx(4 - 2 * 10 / 50)
    # The small run has the fewest FLOPs: the large one is read where it had as many.
    assert small["equal_flops"]["flops"] == large["equal_flops"]["flops"] == small["flops"]
    step = 100 * (small["flops"] / small["tokens"]) / (large["flops"] / large["tokens"])
    assert 50 < step < 60
    assert large["equal_flops"]["training_loss"] == pytest.approx(1 + 1 / int(step), rel=1e-3)
    assert large["validation_loss"] is None
    assert small["others"] == {"evaluation/needle/accuracy": 0.5}


def test_names() -> None:
    assert names_of([Path("x/a/run"), Path("x/b/run")]) == ["a", "b"]
    assert names_of([Path("x/1/swa"), Path("y/1/swa")]) == ["x", "y"]
    assert names_of([Path("x/run")]) == ["run"]
    with pytest.raises(ValueError, match="named twice"):
        names_of([Path("x"), Path("x/../x")])


def test_figures() -> None:
    assert [short(count) for count in (131_072_000, 89.7e6, 512, None)] == ["131M", "89.7M", "512", "-"]
    assert aligned([["a", "loss"], ["long", "1"]]) == "a     loss\nlong     1"


def test_a_run_that_diverged_is_drawn_as_far_as_it_came(runs: list[Path], tmp_path: Path) -> None:
    diverged = [(tag, step, at, 3.0 if step < 4 else math.nan) for tag, step, at, _ in losses(1, 40)]
    samples = [point for point in losses(1, 40) if point[0].endswith("samples")]
    write(tmp_path / "diverged", 1000.0, [*(point for point in diverged if point[0] == "lm loss"), *samples])
    both = [read_run(runs[0]), read_run(tmp_path / "diverged")]
    assert pictures.loss_range(both)[0] < 1 / 100 < 1 / 10 < pictures.loss_range(both)[1] < 1
    assert pictures.loss_range(both[1:])[0] < 3 < pictures.loss_range(both[1:])[1] < 4


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_tool(runs: list[Path], tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    text = tools.run("compare_runs", *runs, "--output", tmp_path / "out", "--format", ending)
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["small", "large"]
    assert "evaluation/needle/accuracy" in text
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"comparison.json", f"losses.{ending}", f"evaluation.{ending}"}
    assert [row["run"] for row in json.loads((tmp_path / "out/comparison.json").read_text())] == ["small", "large"]


def test_bad_input(runs: list[Path], tmp_path: Path) -> None:
    done = tools.start("compare_runs", runs[0], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("compare_runs.py: error: ") and done.stderr.count("\n") == 1
    assert "holds no event file" in done.stderr
    assert "--names has 1 different names for 2 runs" in tools.run("compare_runs", *runs, "--names", "a", fails=True)
