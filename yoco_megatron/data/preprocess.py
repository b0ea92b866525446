"""From a corpus to Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, one document a record.

    read (this thread) -> Batch -> encode (worker threads) -> Encoded -> write (this thread, in the order of the input)

Threads are enough: the tokenizers work outside Python's lock. A run that was killed goes on where it last saved, and
its output has the same bytes as if it had not been.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from yoco_megatron.config.files import write_atomically
from yoco_megatron.data.encoders import Encoder, Ids, choose_encoder, with_ends
from yoco_megatron.data.index import write_index
from yoco_megatron.data.readers import Batch, Position, as_list, check_keys, describe, read_batches
from yoco_megatron.data.sentences import SentenceSplitter
from yoco_megatron.data.unfinished import Unfinished

# How often a run saves where it is.
SAVE_SECONDS = 10.0
PROBLEMS = "problems.jsonl"
# Memory of one read when files are hashed.
BLOCK_BYTES = 1 << 22


@dataclass
class Problem:
    """A record that was left out, or kept though it is worth a look."""

    place: str
    reason: str
    kept: bool = False


@dataclass
class Encoded:
    """The documents of a batch by key, in order, without those that have no token; and what was odd about it."""

    ids: dict[str, Ids]
    text_bytes: dict[str, int]
    empty: dict[str, int]
    nul: dict[str, int]
    bad: int
    problems: list[Problem]


@dataclass
class Report:
    """What one output holds (`bytes` of UTF-8 text) and what made it; written as PREFIX_KEY_document.json.

    `files` is the suffix, "bin" or "idx", -> bytes and sha256 of that file.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bad_lines: int = 0
    empty_documents: int = 0
    documents_with_nul: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    dtype: str = ""
    backend: str = ""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def encode_batch(
    batch: Batch, keys: list[str], encode: Encoder, dtype: type[np.integer], eod: int | None, skip_bad_lines: bool
) -> Encoded:
    """Read and encode one batch; a record that is bad for one key is left out for all.

    Raises:
        ValueError: the first bad record, as "file:number", unless `skip_bad_lines`.
    """
    rows, indices, bad = batch.texts(keys)
    if bad and not skip_bad_lines:
        index, reason = bad[0]
        raise ValueError(
            f"--input {batch.place(index)}: {reason}. Correct it, or leave such records out with --skip-bad-lines"
        )
    odd = [(index, reason, False) for index, reason in bad]
    encoded = Encoded({}, {}, {}, {}, len(bad), [])
    for column, key in enumerate(keys):
        texts = [row[column] for row in rows]
        found = encode(texts)
        nul = [index for index, text in enumerate(texts) if b"\0" in text]
        empty = [index for index, text in enumerate(texts) if not text or not found.lengths[index]]
        if empty:
            found = _without(found, empty)
        if eod is not None:
            found = with_ends(found, [], [eod])
        encoded.ids[key] = Ids(found.ids.astype(dtype), found.lengths)
        encoded.text_bytes[key] = sum(map(len, texts))
        encoded.empty[key], encoded.nul[key] = len(empty), len(nul)
        odd += [(indices[index], f"{key!r} is empty or gives no token", False) for index in empty]
        odd += [(indices[index], f"{key!r} holds NUL characters", True) for index in nul]
    odd.sort(key=lambda entry: entry[0])  # so that the list does not depend on where a batch ends
    encoded.problems = [Problem(batch.place(index), reason, kept) for index, reason, kept in odd]
    return encoded


def _without(found: Ids, empty: list[int]) -> Ids:
    kept = np.ones(len(found.lengths), bool)
    kept[empty] = False
    return Ids(found.ids[np.repeat(kept, found.lengths)], found.lengths[kept])


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
    backend: str = "auto",
    about_tokenizer: dict[str, Any] | None = None,
    sentences: SentenceSplitter | None = None,
) -> dict[str, Report]:
    """Encode the records of `files` into one indexed dataset for each of `keys`.

    Args:
        tokenizer: as Megatron builds it (`data.tokenizer.build_tokenizer`).
        append_eod: end each document with `tokenizer.eod`.
        workers: threads that encode.
        backend: one of `encoders.BACKENDS`.
        about_tokenizer: what to write about the tokenizer into the reports.
        sentences: encode each sentence of a document by itself.
    Returns:
        Key -> report. The datasets are in place; on any error none of them is, and older ones are untouched. What was
        saved until then stays beside them, and the same call goes on from there.
    Raises:
        ValueError: a bad record, a dataset that exists, a tokenizer without an end of document, no document at all.
    """
    from megatron.core.datasets.indexed_dataset import DType

    eod = tokenizer.eod if append_eod else None
    if append_eod and eod is None:
        raise ValueError("--append-eod: the tokenizer has no end-of-document (eos) token; name one in its config")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one thread must encode")
    check_keys(files, keys)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    # The threads below are the parallelism; the tokenizer's own pool would only compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name, encode = choose_encoder(tokenizer, backend)
    if sentences is not None:
        encode = sentences.encoder(encode)

    base = Report(
        dtype=dtype.__name__, backend=name, tokenizer=about_tokenizer or {}, inputs=[str(path) for path in files]
    )
    job = {"input": describe(files), "json-keys": keys, "eod": eod, "tokenizer": base.tokenizer, "dtype": base.dtype}
    job["split-sentences"] = None if sentences is None else [sentences.language, sentences.keep_newlines]
    streams = [f"{key}.{suffix}" for key in keys for suffix in ("bin", "lengths")]
    unfinished = Unfinished(Path(f"{output_prefix}.unfinished"), [*streams, PROBLEMS], job, restart=overwrite)
    complete = False
    try:
        finished = unfinished.state is not None and "finished" in unfinished.state
        prefixes = output_prefixes(output_prefix, keys, overwrite or finished)
        if not finished:
            _write_all(files, unfinished, base, workers, (keys, encode, dtype, eod, skip_bad_lines))
        reports = {key: Report(**saved) for key, saved in unfinished.state["reports"].items()}
        for key, prefix in prefixes.items():
            _move_into_place(unfinished.folder, key, prefix, reports[key])
        _move_problems(unfinished.folder / PROBLEMS, Path(f"{output_prefix}_problems.jsonl"))
        complete = True
    finally:
        unfinished.close(keep=not complete and unfinished.state is not None)
    return reports


def _write_all(
    files: list[Path], unfinished: Unfinished, base: Report, workers: int, encode_args: tuple[Any, ...]
) -> None:
    """Append everything from the saved place on, saving now and then and at the end, when all but names is final."""
    keys = encode_args[0]
    reports = {key: Report(**asdict(base)) for key in keys}
    start, done = Position(), 0
    if unfinished.state:
        start, done = Position(*unfinished.state["position"]), unfinished.state["done"]
        reports = {key: Report(**saved) for key, saved in unfinished.state["reports"].items()}
    earlier = {key: report.seconds for key, report in reports.items()}
    started = saved_at = time.monotonic()
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, initial=done, desc="preprocess", unit="B", unit_scale=True, disable=None) as progress:
        for batch, encoded in _encode_in_order(files, keys, start, workers, encode_args):
            now = time.monotonic()
            for key, report in reports.items():
                _append(unfinished, key, encoded, report)
                report.seconds = round(earlier[key] + now - started, 3)
                report.tokens_per_second = round(report.tokens / max(report.seconds, 1e-3))
            lines = (json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in encoded.problems)
            unfinished.files[PROBLEMS].write("".join(lines).encode())
            if now - saved_at >= SAVE_SECONDS:
                saved = {key: asdict(report) for key, report in reports.items()}
                unfinished.save(position=as_list(batch.end), done=batch.done, reports=saved)
                saved_at = now
            speed = sum(report.tokens_per_second for report in reports.values())
            progress.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            progress.update(batch.done - progress.n)
    for key, report in reports.items():
        if report.documents == 0:
            raise ValueError(f"--input holds no text under the key {key!r} ({report.bad_lines} bad records)")
        unfinished.files[f"{key}.bin"].flush()
        unfinished.files[f"{key}.lengths"].flush()
        report.files = _finish(unfinished.folder, key, encode_args[2])
    unfinished.save(finished=True, reports={key: asdict(report) for key, report in reports.items()})


def _finish(folder: Path, key: str, dtype: type[np.integer]) -> dict[str, dict[str, Any]]:
    """Write the .idx; sizes and checksums of it and of the .bin, by suffix."""
    write_index(folder / f"{key}.idx", np.memmap(folder / f"{key}.lengths", np.int32, "r"), dtype)
    paths = {suffix: folder / f"{key}.{suffix}" for suffix in ("bin", "idx")}
    return {suffix: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for suffix, path in paths.items()}


def _append(unfinished: Unfinished, key: str, encoded: Encoded, report: Report) -> None:
    found = encoded.ids[key]
    unfinished.files[f"{key}.bin"].write(found.ids.tobytes())
    unfinished.files[f"{key}.lengths"].write(found.lengths.astype(np.int32).tobytes())
    report.documents += len(found.lengths)
    report.tokens += len(found.ids)
    report.bytes += encoded.text_bytes[key]
    report.empty_documents += encoded.empty[key]
    report.documents_with_nul += encoded.nul[key]
    report.bad_lines += encoded.bad


def _encode_in_order(
    files: list[Path], keys: list[str], start: Position, workers: int, encode_args: tuple[Any, ...]
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches in `workers` threads, a few ahead of the writer, and give them in the order of the input."""
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    try:
        for batch in read_batches(files, keys, start):
            waiting.append((batch, pool.submit(encode_batch, batch, *encode_args)))
            if len(waiting) > 2 * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _move_into_place(folder: Path, key: str, prefix: str, report: Report) -> None:
    """Put .bin, .json and last .idx in place: an .idx is there only if all that it points to is."""
    if (folder / f"{key}.bin").exists():
        Path(f"{prefix}.idx").unlink(missing_ok=True)  # of an older .bin
    _replace(folder / f"{key}.bin", f"{prefix}.bin")
    write_atomically(Path(f"{prefix}.json"), json.dumps(asdict(report), indent=1) + "\n")
    _replace(folder / f"{key}.idx", f"{prefix}.idx")
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the names
    finally:
        os.close(descriptor)


def _move_problems(source: Path, target: Path) -> None:
    """An empty list is none; nor does one of older data stay."""
    if source.exists() and source.stat().st_size == 0:
        target.unlink(missing_ok=True)
        return
    _replace(source, str(target))


def _replace(source: Path, target: str) -> None:
    """Move, unless an earlier run did before it was killed."""
    if source.exists():
        os.replace(source, target)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as stream,
        tqdm(
            total=size, desc=f"checksum {path.name}", unit="B", unit_scale=True, disable=None, leave=False
        ) as progress,
    ):
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()
