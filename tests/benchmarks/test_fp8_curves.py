"""The comparison of loss curves: what counts as equal, and that a difference ends in an error."""

import json
from argparse import Namespace
from pathlib import Path

import fp8_curves
import pytest


def options_of(tmp_path: Path) -> Namespace:
    output = tmp_path / "rows.jsonl"
    return Namespace(last=20, steps=40, tolerance=0.005, self_decoder="gated_retention", output=output)


def test_the_last_steps_are_compared(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    fp8_curves.compare({"bf16": [9.0, 5.0, 4.0, 3.0, 2.0], "delayed": [8.0, 6.0, 4.0, 3.01, 2.0]}, options, "GPU")
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    assert [row["value"] for row in rows] == [2.5, 2.505]
    assert rows[1]["ratio"] == pytest.approx(2.5 / 2.505, abs=1e-4)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_difference_is_an_error(tmp_path: Path, factor: float) -> None:
    with pytest.raises(SystemExit, match=r"differs by 1\.00% from bf16"):
        fp8_curves.compare({"bf16": [2.0, 2.0], "blockwise": [2.0 * factor] * 2}, options_of(tmp_path), "GPU")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fp8_curves.plot({"bf16": [3.0, 2.0], "delayed": [3.0, 2.1]}, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().rstrip().endswith("</svg>")
