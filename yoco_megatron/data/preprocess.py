"""From JSON lines to Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, one document a line.

    read (this thread) -> Batch -> encode (worker threads) -> Encoded -> write (this thread, in the order of the input)

Threads are enough: the Rust tokenizer works outside Python's lock. The stages share nothing but these two types, so
another reader (parquet, zstd) or another unit of work replaces one of them and leaves the rest alone.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from yoco_megatron.data.corpus import parse_line

# A batch ends at either: enough text to be worth a thread's turn, few enough lines to keep the memory of ids small.
BATCH_BYTES = 1 << 20
BATCH_LINES = 1024


@dataclass(frozen=True)
class Batch:
    """Consecutive lines of one file; `first_line` counts from 1, `size` is their bytes."""

    path: Path
    first_line: int
    lines: list[bytes]
    size: int


@dataclass
class Encoded:
    """The token ids of a batch's documents, by key, in order; a text that gives no token gives no document."""

    ids: dict[str, list[np.ndarray]]
    text_bytes: dict[str, int]
    empty: dict[str, int]
    bad_lines: int = 0


@dataclass
class Report:
    """What one output holds (`bytes` of UTF-8 text) and what made it; written as PREFIX_KEY_document.json."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bad_lines: int = 0
    empty_documents: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    dtype: str = ""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)


def read_batches(files: list[Path]) -> Iterator[Batch]:
    """All lines of `files` in order, in batches that never span two files."""
    for path in files:
        lines: list[bytes] = []
        size, first = 0, 1
        with path.open("rb") as stream:
            for line in stream:
                lines.append(line)
                size += len(line)
                if size >= BATCH_BYTES or len(lines) >= BATCH_LINES:
                    yield Batch(path, first, lines, size)
                    first += len(lines)
                    lines, size = [], 0
        if lines:
            yield Batch(path, first, lines, size)


def encode_batch(
    batch: Batch,
    keys: list[str],
    encode: Callable[[list[str]], list[list[int]]],
    dtype: type[np.integer],
    eod: int | None,
    skip_bad_lines: bool,
) -> Encoded:
    """Parse and encode one batch; blank lines are nothing, a line that is bad for one key is left out for all.

    Raises:
        ValueError: the first bad line, as "file:line", unless `skip_bad_lines`.
    """
    texts: list[list[str]] = []
    bad = 0
    for number, line in enumerate(batch.lines, batch.first_line):
        if not line.strip():
            continue
        try:
            texts.append(parse_line(line, keys, f"--input {batch.path}:{number}"))
        except ValueError as error:
            if not skip_bad_lines:
                raise ValueError(f"{error}. Correct the line, or leave such lines out with --skip-bad-lines") from None
            bad += 1
    encoded = Encoded({}, {}, {}, bad)
    for column, key in enumerate(keys):
        own = [row[column] for row in texts]
        documents = [ids for ids in encode(own) if ids]
        if eod is not None:
            documents = [[*ids, eod] for ids in documents]
        encoded.ids[key] = [np.array(ids, dtype=dtype) for ids in documents]
        encoded.text_bytes[key] = sum(len(text.encode()) for text in own)
        encoded.empty[key] = len(own) - len(documents)
    return encoded


class DatasetWriter:
    """One indexed dataset, written beside its place and invisible until `commit`."""

    def __init__(self, prefix: str, dtype: type[np.integer]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.prefix = prefix
        self.builder = IndexedDatasetBuilder(self._aside("bin"), dtype=dtype)

    def _aside(self, suffix: str) -> str:
        return f"{self.prefix}.{suffix}.tmp"

    def add(self, ids: np.ndarray) -> None:
        self.builder.add_document(ids, [len(ids)])

    def commit(self, report: Report) -> None:
        """Put .bin, .json and last .idx in place: an .idx is there only if all that it points to is."""
        self.builder.finalize(self._aside("idx"))
        Path(self._aside("json")).write_text(json.dumps(asdict(report), indent=1) + "\n")
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)  # of an older .bin
        for suffix in ("bin", "json", "idx"):
            os.replace(self._aside(suffix), f"{self.prefix}.{suffix}")

    def discard(self) -> None:
        """Remove what is not in place; after `commit` nothing is left to remove."""
        self.builder.data_file.close()
        for suffix in ("bin", "json", "idx"):
            Path(self._aside(suffix)).unlink(missing_ok=True)


def output_prefixes(output_prefix: str, keys: list[str], overwrite: bool) -> dict[str, str]:
    """Key -> prefix of its dataset, as Megatron's own preprocessing names them.

    Raises:
        ValueError: such a dataset exists and is not to be overwritten.
    """
    prefixes = {key: f"{output_prefix}_{key}_document" for key in keys}
    for prefix in prefixes.values():
        if not overwrite and Path(f"{prefix}.idx").exists():
            # Megatron's sample index, cached beside the data, is found by the prefix: it would fit the old data only.
            raise ValueError(
                f"--output-prefix: {prefix}.idx exists; choose another prefix, or pass --overwrite and remove the "
                "cached sample indices of the old data (--data-cache-path, by default the folder 'cache' beside them)"
            )
    return prefixes


def preprocess(
    files: list[Path],
    output_prefix: str,
    tokenizer: Any,
    *,
    keys: list[str],
    append_eod: bool,
    workers: int,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
    about_tokenizer: dict[str, Any] | None = None,
) -> dict[str, Report]:
    """Encode JSON lines `files` into one indexed dataset for each of `keys`.

    Args:
        tokenizer: as Megatron builds it (`data.tokenizer.build_tokenizer`).
        append_eod: end each document with `tokenizer.eod`.
        workers: threads that encode.
        about_tokenizer: what to write about the tokenizer into the reports.
    Returns:
        Key -> report. The datasets are in place; on any error none of them is, and older ones are untouched.
    Raises:
        ValueError: a bad line, a dataset that exists, a tokenizer without an end of document, no document at all.
    """
    from megatron.core.datasets.indexed_dataset import DType

    from yoco_megatron.data.tokenizer import batch_encoder

    eod = tokenizer.eod if append_eod else None
    if append_eod and eod is None:
        raise ValueError("--append-eod: the tokenizer has no end-of-document (eos) token; name one in its config")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one thread must encode")
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    prefixes = output_prefixes(output_prefix, keys, overwrite)
    encode = batch_encoder(tokenizer)
    # The threads below are the parallelism; the tokenizer's own pool would only compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
    base = {
        "dtype": dtype.__name__,
        "tokenizer": about_tokenizer or {},
        "inputs": [str(path) for path in files],
    }
    reports = {key: Report(**base) for key in keys}
    writers = {key: DatasetWriter(prefix, dtype) for key, prefix in prefixes.items()}
    started = time.monotonic()
    try:
        for encoded in _encode_in_order(files, workers, keys, encode, dtype, eod, skip_bad_lines):
            for key, report in reports.items():
                for ids in encoded.ids[key]:
                    writers[key].add(ids)
                report.documents += len(encoded.ids[key])
                report.tokens += sum(map(len, encoded.ids[key]))
                report.bytes += encoded.text_bytes[key]
                report.empty_documents += encoded.empty[key]
                report.bad_lines += encoded.bad_lines
        for key, report in reports.items():
            if report.documents == 0:
                raise ValueError(f"--input holds no text under the key {key!r} ({report.bad_lines} bad lines)")
            report.seconds = round(time.monotonic() - started, 3)
            report.tokens_per_second = round(report.tokens / max(report.seconds, 1e-3))
        for key, writer in writers.items():
            writer.commit(reports[key])
    finally:
        for writer in writers.values():
            writer.discard()
    return reports


def _encode_in_order(files: list[Path], workers: int, *encode_args: Any) -> Iterator[Encoded]:
    """Encode batches in `workers` threads, a few ahead of the writer, and give them in the order of the input."""
    total = sum(path.stat().st_size for path in files)
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    with tqdm(total=total, desc="preprocess", unit="B", unit_scale=True, disable=None) as progress:
        try:
            for batch in read_batches(files):
                waiting.append((batch, pool.submit(encode_batch, batch, *encode_args)))
                if len(waiting) > 2 * workers:
                    yield _next(waiting, progress)
            while waiting:
                yield _next(waiting, progress)
        finally:
            pool.shutdown(cancel_futures=True)


def _next(waiting: deque[tuple[Batch, Future[Encoded]]], progress: tqdm) -> Encoded:
    batch, future = waiting.popleft()
    encoded = future.result()
    progress.update(batch.size)
    return encoded
