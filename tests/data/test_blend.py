"""Lists of datasets and weights, and --split: what is one error, and that the rest means what Megatron reads."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
from megatron.training.utils import get_blend_and_blend_per_split

from yoco_megatron.data.blend import DATA_FLAGS, read_blends, shares


def arguments(**given: object) -> Namespace:
    return Namespace(**(dict.fromkeys([*DATA_FLAGS, "split"]) | given))


GOOD = [
    {"data_path": ["a"]},
    {"data_path": ["a", "b", "c"]},
    {"data_path": ["a", "b"]},
    {"data_path": ["0.3", "a", "7e1", "b"]},
    {"train_data_path": ["1", "a", "2", "b"], "valid_data_path": ["c"]},
    {"data_args_path": "0.5 a\n0.5 b\n"},
    {"per_split_data_args_path": {"train": "1 a 2 b", "valid": ["c", "d", "e"], "test": None}},
]


@pytest.mark.parametrize("flags", GOOD, ids=str)
def test_good_lists_mean_what_megatron_reads(flags: dict, tmp_path: Path) -> None:
    for dest in {"data_args_path", "per_split_data_args_path"} & flags.keys():
        content, flags = flags[dest], {dest: str(tmp_path / "file")}
        (tmp_path / "file").write_text(content if isinstance(content, str) else json.dumps(content))
    args = arguments(**flags)
    assert read_blends(args) == get_blend_and_blend_per_split(args)


NO_WEIGHT = "must be a number above 0"
BAD = [
    (["0", "a", "0", "b"], NO_WEIGHT),
    (["0", "a", "1", "b"], NO_WEIGHT),
    (["-1", "a", "2", "b"], NO_WEIGHT),
    (["nan", "a", "1", "b"], NO_WEIGHT),
    (["1", "a", "inf", "b"], NO_WEIGHT),
    (["1e-320", "a", "1e30", "b"], "too far apart"),
    (["1", "a", "half", "b"], "'half' is no weight"),
    ([], "is empty"),
    (["a", " ", "b"], "is empty"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=str)
def test_bad_lists_are_refused_in_each_form(words: list[str], message: str, tmp_path: Path) -> None:
    for dest in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        with pytest.raises(ValueError, match=rf"^--{dest.replace('_', '-')}.*{message}"):
            read_blends(arguments(**{dest: words}))
    (tmp_path / "file").write_text(json.dumps({"train": ["a"], "valid": words, "test": None}))
    with pytest.raises(ValueError, match=rf"^--per-split-data-args-path .*file: valid.*{message}"):
        read_blends(arguments(per_split_data_args_path=str(tmp_path / "file")))
    if " " not in words:
        (tmp_path / "file").write_text(" ".join(words))
        with pytest.raises(ValueError, match=rf"^--data-args-path .*file.*{message}"):
            read_blends(arguments(data_args_path=str(tmp_path / "file")))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"train": "a"}', '{"train": "a", "valid": 1, "test": null}'])
def test_files_of_another_form(content: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=r"^--per-split-data-args-path .*file"):
        read_blends(arguments(per_split_data_args_path=str(tmp_path / "file")))


def test_flags_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="--data-path and --train-data-path contradict each other"):
        read_blends(arguments(data_path=["a"], train_data_path=["b"]))
    with pytest.raises(ValueError, match="--split 9,1,0 has no effect with --train-data-path"):
        read_blends(arguments(train_data_path=["b"], split="9,1,0"))


@pytest.mark.parametrize("split", ["969, 30, 1", "100", "98,2", "1,0,0", ".5,.25,.25", "60.0,40,0"])
def test_shares_are_megatrons(split: str) -> None:
    assert shares(split) == parse_and_normalize_split(split)


@pytest.mark.parametrize(
    "split", ["110,-5,-5", "nan,1,1", "inf,0,0", "0,0,0", "1,1,1,1", "1e-3,1,1", "98 1 1", "98/1/1", "", "a,b", "1,,1"]
)
def test_shares_that_are_none(split: str) -> None:
    with pytest.raises(ValueError, match=r"^--split .*: give the shares of train, valid and test"):
        shares(split)
