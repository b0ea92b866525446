"""The lines that say what a run is: where its weights come from."""

from argparse import Namespace
from pathlib import Path

import pytest

from yoco_megatron.checkpoint.layout import TRACKER
from yoco_megatron.startup.summary import _origin


@pytest.mark.parametrize(
    ("load", "pretrained", "step", "said"),
    [
        ("run", None, None, "run, checkpoint 40"),
        ("run", None, 20, "run, checkpoint 20"),
        ("new", None, None, "random weights: new has no checkpoint"),
        ("new", "run", None, "the weights of run, checkpoint 40"),
        (None, "run", None, "the weights of run, checkpoint 40"),
        ("run", "other", None, "run, checkpoint 40"),
    ],
)
def test_origin(
    load: str | None,
    pretrained: str | None,
    step: int | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, iteration in (("run", "40"), ("other", "7")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / TRACKER).write_text(iteration)
    assert _origin(Namespace(load=load, pretrained_checkpoint=pretrained, ckpt_step=step)) == said
