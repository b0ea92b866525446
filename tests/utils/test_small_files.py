"""Small files are read whole or refused with their name: whatever stands in their place, and whatever they hold."""

import os
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest

from yoco_megatron.utils.small_files import BadFile, mismatch, parse_json, read_json, read_json_lines, read_text


class Record(TypedDict):
    name: str
    kind: Literal["a", "b"]
    steps: list[int]
    rate: float | None


WHOLE: dict[str, Any] = {"name": "x", "kind": "a", "steps": [1, 2], "rate": 1}


def test_whole_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"name": "x", "kind": "a", "steps": [1, 2], "rate": 1, "more": true}')
    assert read_json(tmp_path / "file", Record) == WHOLE | {"more": True}


@pytest.mark.parametrize(
    "damage",
    [
        {"name": None},
        {"kind": "c"},
        {"kind": ["a"]},
        {"steps": [1, True]},
        {"steps": [1, "2"]},
        {"steps": {"1": 2}},
        {"rate": "1"},
        {"rate": False},
    ],
)
def test_other_types_are_named(damage: dict[str, Any]) -> None:
    assert mismatch(WHOLE, Record) is None
    assert mismatch([1, 2], tuple[int, ...]) is None and mismatch([1, "2"], tuple[int, ...]) is not None
    (key,) = damage
    wrong = mismatch(WHOLE | damage, Record)
    assert wrong is not None and (key in wrong or wrong.startswith("entry 1"))
    assert mismatch({name: value for name, value in WHOLE.items() if name != key}, Record) == (
        f"the content has no {key!r}"
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "NaN", "[-Infinity]", "1e999", "9" * 5000, "18446744073709551616", '{"a": 1, "a": 1}', "[" * 100000],
)
def test_text_that_would_be_misread_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not JSON"):
        parse_json(text)


def stand_in(path: Path, what: str) -> None:
    {
        "missing": lambda: None,
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
        "too large": lambda: path.write_bytes(bytes(2048)),
        "no text": lambda: path.write_bytes(b"\xff"),
    }[what]()


@pytest.mark.parametrize("what", ["missing", "folder", "device", "pipe", "loop", "too large", "no text"])
def test_what_is_no_small_file_is_refused(what: str, tmp_path: Path) -> None:
    stand_in(tmp_path / "file", what)
    with pytest.raises(BadFile, match=str(tmp_path / "file")):
        read_text(tmp_path / "file", limit=1024)


def test_missing_file_may_have_a_meaning(tmp_path: Path) -> None:
    assert read_json(tmp_path / "file", missing={}) == {}
    assert read_json_lines(tmp_path / "file") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="is not JSON"):
        read_json(tmp_path / "file", missing={})


@pytest.mark.filterwarnings("ignore:.*left out")
def test_bad_lines_are_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'{"a": 1}\n\xff\n[]\n{"a": 2}\n{"a"')
    with pytest.warns(UserWarning, match="line 5"):
        assert read_json_lines(tmp_path / "file") == [{"a": 1}, {"a": 2}]
