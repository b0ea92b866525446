"""Records of a corpus in batches, from any place in it: JSON lines, parquet and plain text, compressed or not.

    files -> read_batches(files, start) -> Batch -> Batch.texts(keys), in any thread

A text file is one record. JSON lines and text may be compressed with gzip, bzip2, xz or zstd, detected by magic bytes.
"""

import codecs
import contextlib
import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, repeat
from pathlib import Path
from typing import Any, NamedTuple

from yoco_megatron.corpus.decompress import COMPRESSED_SUFFIXES, DAMAGED, decompressed, skip
from yoco_megatron.corpus.gather import parse_line, parse_object
from yoco_megatron.corpus.text_encoding import foreign_encoding, refuse

# A batch ends at either: enough text to be worth a thread's turn, few enough records to keep the memory of ids small.
BATCH_BYTES = 1 << 20
BATCH_RECORDS = 1024
BATCH_ROWS = 128


JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson"})


@dataclass(frozen=True)
class Position:
    """A place between two records.

    Args:
        file: index of the file.
        offset: bytes before it in the (decompressed) JSON lines file, rows in a parquet file, 0 in a text file.
        record: records of the file before it.
    """

    file: int = 0
    offset: int = 0
    record: int = 0


class Parsed[T](NamedTuple):
    """The good records of a batch; their indices in it; (index, reason) of each bad one."""

    good: list[T]
    indices: list[int]
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class Batch:
    """Consecutive records of one file, or consecutive text files.

    Args:
        path: the file.
        first: number of the first record in it, from 1.
        records: lines, rows of a parquet file, or paths of text files; all of one kind.
        size: their bytes in memory.
        end: where the next batch begins.
        done: bytes of all files that were read up to there, as they are on disk.
    """

    path: Path
    first: int
    records: Sequence[bytes | tuple[Any, ...] | Path]
    size: int
    end: Position
    done: int

    def place(self, index: int) -> str:
        """Where a record is: "file:number", or the text file."""
        record = self.records[index]
        return str(record) if isinstance(record, Path) else f"{self.path}:{self.first + index}"

    def texts(self, keys: list[str]) -> Parsed[list[bytes]]:
        """The records' UTF-8 texts, one a key."""
        return self._parse(lambda record, place: _texts(record, keys, place))

    def objects[T](self, keys: list[str], parse: Callable[[dict[str, Any]], T]) -> Parsed[T]:
        """What `parse` makes of each record, a JSON object or a row of a parquet file, or raises as a ValueError."""
        return self._parse(lambda record, place: parse(_object(record, keys, place)))

    def _parse[T](self, parse: Callable[[Any, str], T]) -> Parsed[T]:
        good: list[T] = []
        indices: list[int] = []
        bad: list[tuple[int, str]] = []
        for index, record in enumerate(self.records):
            if isinstance(record, bytes) and not record.strip():
                continue  # a blank line is no record
            place = self.place(index)
            try:
                good.append(parse(record, place))
                indices.append(index)
            except ValueError as error:
                bad.append((index, str(error).removeprefix(f"{place}: ")))
        return Parsed(good, indices, bad)


def _texts(record: bytes | tuple[Any, ...] | Path, keys: list[str], place: str) -> list[bytes]:
    if isinstance(record, bytes):
        return parse_line(record, keys, place)
    if isinstance(record, tuple):
        return [_utf8(value, place) for value in record]
    return [_file_text(record, place)]


def _object(record: bytes | tuple[Any, ...] | Path, keys: list[str], place: str) -> dict[str, Any]:
    if isinstance(record, bytes):
        return parse_object(record, place)
    if isinstance(record, tuple):
        return {key: _plain(value, place) for key, value in zip(keys, record) if value is not None}
    raise ValueError(f"{place}: a text file has no keys")


def _plain(value: Any, place: str) -> Any:
    """A value of a parquet file as JSON would have it: a field that a row lacks is null there."""
    if isinstance(value, bytes):
        return _utf8(value, place).decode()
    if isinstance(value, dict):
        return {key: _plain(item, place) for key, item in value.items() if item is not None}
    return [_plain(item, place) for item in value] if isinstance(value, list) else value


def _utf8(value: Any, place: str) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"{place}: no text in the column but {'null' if value is None else type(value).__name__}")
    if name := foreign_encoding(value):
        raise ValueError(f"{place}: {refuse(name)}")
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error})") from None
    return value


def _file_text(path: Path, place: str) -> bytes:
    try:
        with path.open("rb") as raw, decompressed(raw) as stream:
            return _utf8(stream.read(), place).removeprefix(codecs.BOM_UTF8)
    except DAMAGED as error:
        raise ValueError(f"{place}: damaged or ends too early ({error})") from None


def file_format(path: Path) -> str:
    """'jsonl', 'parquet' or 'text', by the file name without a compression suffix."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED_SUFFIXES else path
    suffix = name.suffix.lower()
    return "jsonl" if suffix in JSON_SUFFIXES else "parquet" if suffix == ".parquet" else "text"


def expand_inputs(patterns: list[str]) -> list[Path]:
    """The files that `--input` names, in the order given, each once; globs and folders (at any depth) sorted.

    Raises:
        ValueError: a name or pattern that matches no file, or one that the system refuses to look at.
    """
    files: list[Path] = []
    for pattern in patterns:
        given = Path(pattern)
        with _input_errors(pattern):
            found = [given] if given.exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
            below = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in found]
            found = [path for paths in below for path in paths if path.is_file()]
        if not found:
            raise ValueError(f"--input {pattern} matches no file; check the path (a glob must be quoted)")
        files += found
    return list(dict.fromkeys(files))


@contextlib.contextmanager
def _input_errors(name: str | Path) -> Iterator[None]:
    """Turn an OSError inside into a ValueError that names this input."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--input {name} cannot be read: {error}") from error


def check_keys(files: list[Path], keys: list[str]) -> None:
    """Check before any work that each file can have texts under `keys`.

    Raises:
        ValueError: keys for a text file, which has none, or columns that a parquet file lacks.
    """
    for path in files:
        kind = file_format(path)
        if kind == "text" and keys != ["text"]:
            raise ValueError(
                f"--json-keys {' '.join(keys)}: {path} is read as one plain text, which has no keys; name JSON lines "
                f"files {', '.join(sorted(JSON_SUFFIXES))}"
            )
        if kind == "parquet":
            columns = _parquet(path).schema_arrow.names
            missing = [key for key in keys if key not in columns]
            if missing:
                raise ValueError(f"--json-keys {missing[0]}: {path} has the columns {', '.join(columns)}")


def read_batches(files: list[Path], keys: list[str], start: Position | None = None) -> Iterator[Batch]:
    """All records of `files` in order, from `start` on.

    Args:
        keys: columns of parquet files; one that a file lacks is None in all its rows (see `check_keys`).
    Raises:
        ValueError: a compressed or parquet file that is damaged or ends too early, JSON lines that are not UTF-8.
    """
    start = start or Position()
    ends = list(accumulate(path.stat().st_size for path in files))
    texts: list[Path] = []
    size = 0
    for index in range(start.file, len(files)):
        path, before = files[index], ends[index - 1] if index else 0
        kind = file_format(path)
        if kind == "text":
            texts.append(path)
            size += ends[index] - before
            last = index + 1 == len(files) or file_format(files[index + 1]) != "text"
            if last or size >= BATCH_BYTES or len(texts) >= BATCH_RECORDS:
                yield Batch(texts[0], 1, texts, size, Position(index + 1), ends[index])
                texts, size = [], 0
            continue
        here = start if index == start.file else Position(index)
        read = _read_lines if kind == "jsonl" else _read_rows
        try:
            yield from read(path, here, before, keys)
        except DAMAGED as error:
            raise ValueError(f"--input {path} is damaged or ends too early ({error}); replace the file") from error


def _read_lines(path: Path, start: Position, before: int, keys: list[str]) -> Iterator[Batch]:
    lines: list[bytes] = []
    size, place = 0, start
    with path.open("rb") as raw, decompressed(raw) as stream:
        if not start.offset:
            _check_encoding(path, stream)
        skip(stream, start.offset)
        for line in stream:
            lines.append(line)
            size += len(line)
            if size >= BATCH_BYTES or len(lines) >= BATCH_RECORDS:
                place = Position(place.file, place.offset + size, place.record + len(lines))
                yield Batch(path, place.record - len(lines) + 1, lines, size, place, before + raw.tell())
                lines, size = [], 0
    if lines:
        end = Position(place.file, place.offset + size, place.record + len(lines))
        yield Batch(path, place.record + 1, lines, size, end, before + path.stat().st_size)


def _check_encoding(path: Path, stream: Any) -> None:
    """Raises ValueError for JSON lines in UTF-16 or UTF-32: a NUL beside their first character tells them, too."""
    start = stream.peek(4)[:4]
    name = foreign_encoding(start) or ("UTF-16 or UTF-32" if b"\0" in start else None)
    if name is not None:
        raise ValueError(f"--input {path}: {refuse(name)}")


def _read_rows(path: Path, start: Position, before: int, keys: list[str]) -> Iterator[Batch]:
    parquet = _parquet(path)
    size, row = path.stat().st_size, 0
    columns = [key for key in keys if key in parquet.schema_arrow.names]
    for table in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
        first, row = row, row + table.num_rows
        if row > start.offset:
            table = table.slice(max(start.offset - first, 0))
            values = [_as_bytes(table.column(key)) if key in columns else repeat(None, len(table)) for key in keys]
            records = list(zip(*values))
            done = before + size * row // parquet.metadata.num_rows
            yield Batch(path, row - len(records) + 1, records, table.nbytes, Position(start.file, row, row), done)


def _as_bytes(column: Any) -> list[Any]:
    """Values of an arrow column; text as bytes, because one text that is not UTF-8 would fail the whole column."""
    import pyarrow

    binary = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}.get(column.type)
    return (column if binary is None else column.cast(binary)).to_pylist()


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"--input {path} is a parquet file: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"--input {path} is not a whole parquet file ({error}); replace it") from None


def describe(files: list[Path]) -> list[dict[str, Any]]:
    """What identifies the input files, so that a resumed run notices a change: path, bytes, modification time.

    Raises:
        ValueError: a file that is gone.
    """
    found = []
    for path in files:
        with _input_errors(path):
            found.append({"path": str(path), "bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns})
    return found


def as_list(position: Position) -> list[int]:
    """For JSON; `Position(*...)` reads it back."""
    return list(asdict(position).values())
