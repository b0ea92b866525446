"""Which format the checkpoint has that a run will load, and which model: told before anything starts."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from yoco_megatron.checkpoint import architecture, layout
from yoco_megatron.utils.small_files import BadFile


def saved(folder: Path, form: str, iteration: int | None) -> None:
    """A checkpoint as Megatron leaves one of that format; None: a release."""
    path = folder / "release" if iteration is None else layout.path_of(folder, iteration)
    file = path / ("metadata.json" if form == "torch_dist" else "mp_rank_00/model_optim_rng.pt")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    (folder / layout.TRACKER).write_text("release" if iteration is None else str(iteration))


def flags(folder: Path, form: str, detect: bool = False, step: int | None = None) -> Namespace:
    return Namespace(
        load=str(folder), pretrained_checkpoint=None, ckpt_step=step, ckpt_format=form, auto_detect_ckpt_format=detect
    )


@pytest.mark.parametrize("iteration", [3, None])
@pytest.mark.parametrize(("found", "given"), [("torch", "torch_dist"), ("torch_dist", "torch")])
def test_another_format_is_named(found: str, given: str, iteration: int | None, tmp_path: Path) -> None:
    saved(tmp_path, found, iteration)
    architecture.check_format(flags(tmp_path, found))
    with pytest.raises(ValueError, match=rf"in the format {found}: add --ckpt-format {found}$"):
        architecture.check_format(flags(tmp_path, given))


def test_the_checkpoint_that_is_asked_for_decides(tmp_path: Path) -> None:
    saved(tmp_path, "torch", 3)
    saved(tmp_path, "torch_dist", 4)
    architecture.check_format(flags(tmp_path, "torch_dist"))
    architecture.check_format(flags(tmp_path, "torch", step=3))
    with pytest.raises(ValueError, match="iter_0000003"):
        architecture.check_format(flags(tmp_path, "torch_dist", step=3))


def test_megatrons_detection_finds_one_of_the_two(tmp_path: Path) -> None:
    saved(tmp_path, "torch_dist", 4)
    architecture.check_format(flags(tmp_path, "torch", detect=True))
    saved(tmp_path, "torch", 5)
    with pytest.raises(ValueError, match="torch: add"):
        architecture.check_format(flags(tmp_path, "torch_dist", detect=True))


def test_nothing_there_is_no_format(tmp_path: Path) -> None:
    architecture.check_format(flags(tmp_path, "torch"))


@pytest.mark.parametrize(
    "edit", [{"mtp_num_layers": "1"}, {"hidden_size": None}, {"shared_kv_sources": [1, "2"]}, {"tied": 1}]
)
def test_a_field_edited_by_hand_is_named(edit: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / architecture.FILE_NAME).write_text(json.dumps({"architecture": "yoco"} | edit))
    with pytest.raises(BadFile, match=rf"does not hold what it should: (entry 1 of )?'{next(iter(edit))}' is "):
        architecture.read(tmp_path)
