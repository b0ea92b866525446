"""The comparison with published runs is the one that docs/planning.md shows."""

from pathlib import Path

import published_runs
import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert published_runs.table() in (ROOT / "docs/planning.md").read_text()


def test_meshes_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    llama, _, long, *_ = (run.plan() for run in published_runs.RUNS)
    assert llama.mesh == "TP8 PP16 VP4 DP64" and long.mesh == "TP8 PP16 VP4 CP16 DP8"
    assert llama.args.global_batch_size * llama.args.seq_length == 2**24
    assert [stage["decoder"] for stage in llama.stages][:2] == [1, 2]  # one layer less, beside the embedding
