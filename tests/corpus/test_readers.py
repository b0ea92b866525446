"""Every record of every format is read, in order, from any place; every bad one is listed with its place."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from yoco_megatron.corpus import readers
from yoco_megatron.corpus.readers import Position, check_keys, expand_inputs, read_batches

TEXTS = [f"document {n} " + "größer 漢字 " * (n % 13) for n in range(200)]
LINES = "".join(json.dumps({"text": text, "title": text[:9]}) + "\n" for text in TEXTS).encode()


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def parquet(path: Path, columns: dict[str, list], **more) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, row_group_size=70, **more)
    return path


def read(files: list[Path], keys: list[str], start: Position | None = None):
    """Texts, places of the good records and (place, reason) of the bad ones, and the batches."""
    good, places, bad, batches = [], [], [], list(read_batches(files, keys, start))
    for batch in batches:
        rows, where, wrong = batch.texts(keys)
        good += [[text.decode() for text in row] for row in rows]
        places += [batch.place(index) for index in where]
        bad += [(batch.place(index), reason) for index, reason in wrong]
    return good, places, bad, batches


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """All formats, and compressed ones in two members."""
    files = []
    for number, (suffix, compress) in enumerate(COMPRESSORS.items()):
        path = tmp_path / f"{number}.jsonl{suffix}"
        path.write_bytes(compress(LINES[:1000]) + compress(LINES[1000:]))
        files.append(path)
    files.append(parquet(tmp_path / "5.parquet", {"other": [1] * 200, "text": TEXTS}))
    for number, text in enumerate(TEXTS[:9]):
        path = tmp_path / f"6.{number}.txt.gz"
        path.write_bytes(gzip.compress(text.encode()))
        files.append(path)
    return files


def test_all_formats_from_every_place(corpus: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_RECORDS", 7)
    monkeypatch.setattr(readers, "BATCH_ROWS", 7)
    good, places, bad, batches = read(corpus, ["text"])
    assert [row[0] for row in good] == TEXTS * 6 + TEXTS[:9]
    assert bad == []
    assert places[:2] == [f"{corpus[0]}:1", f"{corpus[0]}:2"] and places[1005] == f"{corpus[5]}:6"
    assert places[-1] == str(corpus[-1])
    done = [batch.done for batch in batches]
    assert done == sorted(done) and done[-1] == sum(path.stat().st_size for path in corpus)
    seen = 0
    for index, batch in enumerate(batches):
        seen += len(batch.records)
        if index % 5 == 0:
            assert read(corpus, ["text"], batch.end)[0] == good[seen:]
            assert read(corpus, ["text"], batch.end)[1] == places[seen:]


ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_lines_in_utf_16_are_refused_with_the_fix(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = tmp_path / f"f.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix]('\n{"text": "漢字 и Привет"}\n'.encode(encoding)))
    with pytest.raises(ValueError, match=rf"--input {path}: it is UTF-(16|32).* text, .*: iconv -f UTF-"):
        list(read_batches([path], ["text"]))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_texts_in_utf_16_are_bad(tmp_path: Path, encoding: str) -> None:
    """Not learned with a NUL beside each character: most of them are valid UTF-8."""
    texts = [f"a plain text {n}" * 9 for n in range(2)] + ["größer als größer", "Привет, мир", "{}"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode(encoding)))
    table = parquet(tmp_path / "9.parquet", {"text": [text.encode(encoding) for text in texts]})
    good, _, bad, _ = read([*sorted(tmp_path.glob("*.gz")), table], ["text"])
    assert good == [] and len(bad) == 2 * len(texts)
    assert all(f"UTF-{encoding[4:6]}" in reason and "iconv" in reason for _, reason in bad)


def test_what_is_no_utf_16(tmp_path: Path) -> None:
    texts = [
        "",
        "a",
        "x\0",
        "a\0b",
        "\0" * 99,
        "a\tb\tc\n" * 50,
        "tail" * 1000 + "\0a" * 1000,
        "漢字" * 2000,
        "\ufeffmark",
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, newline="")
    (tmp_path / "9.jsonl").write_text('\ufeff{"text": "mark"}\n')
    good, _, bad, _ = read(sorted(tmp_path.iterdir()), ["text"])
    assert [row[0] for row in good] == [*texts[:-1], "mark", "mark"] and bad == []


def test_bad_records_are_listed_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    records = [
        b'{"text": "good"}', b"", b"{broken", b'{"text": "\xff\xfe"}', b'{"other": "x"}', b'{"text": 3}', b"[1]",
        b'{"text": "raw \x00 nul"}', b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": "escaped \\u0000 nul"}',
        b'{"text": "windows"}\r', b'\xef\xbb\xbf{"text": "byte order mark"}', b'{"text": "cut',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(records))
    good, places, bad, _ = read([path], ["text"])
    assert [row[0] for row in good] == ["good", "escaped \0 nul", "windows", "byte order mark"]
    assert places == [f"{path}:{number}" for number in (1, 11, 12, 13)]
    assert [place for place, _ in bad] == [f"{path}:{number}" for number in (3, 4, 5, 6, 7, 8, 9, 10, 14)]
    assert "utf-8" in bad[1][1] and "no text under the key 'text'" in bad[2][1] and "surrogate" in bad[6][1]


def test_bad_rows_and_files_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array([b"fine", b"\xff", None], pyarrow.binary())
    table = parquet(tmp_path / "t.parquet", {"text": column})
    numbers = parquet(tmp_path / "n.parquet", {"text": [1, 2]})
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress(b"cut" * 999)[:-9])
    (tmp_path / "z.txt").write_text("fine")
    good, places, bad, _ = read(
        [table, numbers, *(tmp_path / name for name in ("x.txt", "y.txt.gz", "z.txt"))], ["text"]
    )
    assert good == [["fine"], ["fine"]] and places == [f"{table}:1", str(tmp_path / "z.txt")]
    assert [place.rpartition("/")[2] for place, _ in bad] == [
        "t.parquet:2", "t.parquet:3", "n.parquet:1", "n.parquet:2", "x.txt", "y.txt.gz",
    ]  # fmt: skip
    assert "not UTF-8" in bad[0][1] and "ends too early" in bad[-1][1]


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSORS if suffix])
def test_compressed_files_that_end_too_early_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.jsonl{suffix}"
    path.write_bytes(COMPRESSORS[suffix](LINES)[:-10])
    with pytest.raises(ValueError, match=rf"--input .*cut\.jsonl{suffix} is damaged or ends too early"):
        read([path], ["text"])


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSORS if suffix])
def test_compressed_files_without_a_byte_are_refused(tmp_path: Path, suffix: str) -> None:
    """A compressed empty file has some bytes; an empty file was never written. A plain file may be empty."""
    lines, text = tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}"
    lines.touch()
    text.touch()
    with pytest.raises(ValueError, match=rf"--input .*a\.jsonl{suffix} is damaged .*it is empty"):
        read([lines], ["text"])
    assert "it is empty" in read([text], ["text"])[2][0][1]
    lines.write_bytes(COMPRESSORS[suffix](b""))
    (tmp_path / "c.jsonl").touch()
    assert read([lines, tmp_path / "c.jsonl"], ["text"])[:3] == ([], [], [])


def test_zstd_that_begins_with_a_frame_without_data(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\x00\x00\x00size" + zstd(LINES))
    assert [row[0] for row in read([path], ["text"])[0]] == TEXTS


def test_a_text_file_begins_after_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo \ufeff".encode())
    assert read([tmp_path / "a.txt"], ["text"])[0] == [["one\r\ntwo \ufeff"]]


def test_what_cannot_be_read_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"--json-keys title: .*a\.txt .*no keys"):
        check_keys([tmp_path / "a.txt"], ["title"])
    table = parquet(tmp_path / "t.parquet", {"text": ["x"], "more": ["y"]})
    with pytest.raises(ValueError, match=r"--json-keys title: .*t\.parquet has the columns text, more"):
        check_keys([table], ["text", "title"])
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.parquet is not a whole parquet file"):
        check_keys([table], ["text"])


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b/x.txt", "b/c/y.md", "a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("t")
    found = expand_inputs([str(tmp_path / "b"), str(tmp_path / "*.jsonl"), str(tmp_path / "b" / "x.txt")])
    assert [path.name for path in found] == ["y.md", "x.txt", "a.jsonl"]
    with pytest.raises(ValueError, match=r"--input .*\.gz matches no file"):
        expand_inputs([str(tmp_path / "*.gz")])


def test_what_the_system_refuses_is_the_inputs_fault(tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 300))
    with pytest.raises(ValueError, match=r"--input .*xxx cannot be read: .*File name too long"):
        expand_inputs([long])
    with pytest.raises(ValueError, match=r"--input .*gone\.jsonl cannot be read: .*No such file"):
        readers.describe([tmp_path / "gone.jsonl"])
