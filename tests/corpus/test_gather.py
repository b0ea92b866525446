"""Gathering files into a corpus: what is taken, in which order, and what an interrupted or failed run leaves behind."""

import json
from pathlib import Path

import pytest

from yoco_megatron.corpus.gather import find_files, gather, parse_line, python_stdlib
from yoco_megatron.corpus.readers import expand_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    for number in range(20):
        path = root / f"part{number % 3}" / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"text {number}\r\nzweite Zeile: ä\n".encode())
    (root / "latin1.txt").write_bytes(b"caf\xe9")
    (root / "utf16.txt").write_bytes("valid UTF-8, too".encode("utf-16-le"))
    (root / "blank.txt").write_bytes(b" \n\n")
    (root / "code.py").write_text("pass\n")
    return root


def records(corpus: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]


def test_documents_are_the_files_and_others_are_counted(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    report = gather(folder, find_files(folder, ["*.txt"]), corpus)
    assert (report.documents, report.not_utf8, report.empty) == (20, 2, 1)
    assert report.bytes == sum(len(record["text"].encode()) for record in records(corpus))
    for record in records(corpus):
        assert record["text"].encode() == (folder / record["path"]).read_bytes()
    assert {record["path"] for record in records(corpus)} == {f"part{n % 3}/{n:02}.txt" for n in range(20)}


def test_order_is_shuffled_by_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    paths = sorted(find_files(folder, ["*.txt", "*.py"]))
    corpora = [tmp_path / name for name in ("a", "b", "c")]
    gather(folder, paths, corpora[0], seed=1)
    gather(folder, paths[::-1], corpora[1], seed=1)
    gather(folder, paths, corpora[2], seed=2)
    assert corpora[0].read_bytes() == corpora[1].read_bytes()
    order = [[record["path"] for record in records(corpus)] for corpus in corpora]
    assert order[0] != order[2]
    assert sorted(order[0]) == sorted(order[2]) != order[0]


def test_corpus_appears_by_renaming(folder: Path, tmp_path: Path) -> None:
    """Who reads the old corpus (here by a second name) goes on reading the old one."""
    corpus, old = tmp_path / "corpus.jsonl", tmp_path / "old.jsonl"
    gather(folder, find_files(folder, ["*.txt"]), corpus)
    old.hardlink_to(corpus)
    content = old.read_bytes()
    gather(folder, find_files(folder, ["*.py"]), corpus)
    assert old.read_bytes() == content != corpus.read_bytes()


def test_corpus_inside_the_folder_is_not_a_document(folder: Path) -> None:
    corpus = folder / "corpus.jsonl"
    first = gather(folder, find_files(folder, ["*"]), corpus)
    assert gather(folder, find_files(folder, ["*"]), corpus) == first


def test_failed_run_leaves_the_old_corpus(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    old = '{"text": "old", "path": "a.txt"}\n'
    corpus.write_text(old)
    with pytest.raises(ValueError, match=r"--input .* UTF-8"):
        gather(folder, [folder / "latin1.txt"], corpus)
    assert corpus.read_text() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "texts"]


def test_unmatched_inputs_name_the_flag(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--glob \*\.rst"):
        find_files(folder, ["*.rst"])
    with pytest.raises(ValueError, match=r"--input .* not a folder"):
        find_files(folder / "code.py", ["*"])
    with pytest.raises(ValueError, match=r"--input .*\.jsonl matches no file"):
        expand_inputs([str(tmp_path / "*.jsonl")])


def test_inputs_keep_their_order_and_come_once(tmp_path: Path) -> None:
    for name in "bac":
        (tmp_path / f"{name}.jsonl").touch()
    found = expand_inputs([str(tmp_path / "c.jsonl"), str(tmp_path / "*.jsonl")])
    assert [path.stem for path in found] == ["c", "a", "b"]


def test_standard_library_is_python_without_installed_packages() -> None:
    root, paths = python_stdlib()
    names = {path.relative_to(root).as_posix() for path in paths}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "half', "not a line of JSON"),
        (b'{"text": "caf\xe9"}', "not a line of JSON"),
        (b'["text"]', "must be an object .* not list"),
        (b'{"body": "x"}', r"no text under the key 'text' \(keys: body\); name another key"),
        (b'{"text": 3}', "value under the key 'text' is of the type int, not text"),
        (b'{"text": null}', "value under the key 'text' is null, not text"),
        (b'{"text": "\x00"}', "not a line of JSON"),
        ('{"text": "x"}'.encode("utf-16-be"), "not a line of JSON"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_bad_lines_say_where_and_why(line: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^f.jsonl:7: .*{reason}"):
        parse_line(line, ["text"], "f.jsonl:7")
    assert parse_line(b'{"a": "1", "text": "\xc3\xa9"}', ["text", "a"], "") == ["é".encode(), b"1"]
