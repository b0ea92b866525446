"""From a corpus to Megatron's indexed datasets: PREFIX_KEY_document.bin and .idx, one document a record.

    read (this thread) -> Batch -> encode (worker threads) -> Encoded -> write (this thread, in the order of the input)

Threads are enough: the tokenizers release Python's lock. A killed run resumes where it last saved, and its
output has the same bytes as that of an undisturbed run.
"""

import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from yoco_megatron.corpus.encoders import (
    Encoder,
    Ids,
    TextError,
    choose_encoder,
    find_special,
    join,
    with_ends,
)
from yoco_megatron.corpus.idx_writer import write_index
from yoco_megatron.corpus.readers import Batch, Position, as_list, check_keys, describe, read_batches
from yoco_megatron.corpus.resume_state import ResumeState
from yoco_megatron.corpus.sentences import SentenceSplitter
from yoco_megatron.data.idx import check_index
from yoco_megatron.data.token_sample import sample_tokens
from yoco_megatron.data.tokenizer import id_limit, special_tokens
from yoco_megatron.utils.files import write_atomically

# Time between two saves of the progress.
SAVE_SECONDS = 10.0
PROBLEMS = "problems.jsonl"
# Bad records that are skipped before the run stops: a torn line should not stop it, a wrong --json-keys should.
MAX_BAD_LINES = 1000
# Characters of a reason in the list; a record may name thousands of keys.
REASON_LENGTH = 300
# Longest document that an .idx can hold.
MAX_TOKENS = np.iinfo(np.int32).max
# Memory of one read when files are hashed.
BLOCK_BYTES = 1 << 22


@dataclass
class Problem:
    """A suspicious record: 'bad' (skipped), 'empty' (no document) or 'kept' (used as it is)."""

    place: str
    reason: str
    kind: str


def printable(text: str) -> str:
    """`text` with everything that is not Unicode (file names in other encodings, lone surrogates) escaped."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Ends:
    """The ids before and after each document, and the special tokens (id -> text) that should be nowhere else."""

    prefix: list[int] = field(default_factory=list)
    suffix: list[int] = field(default_factory=list)
    special: dict[int, str] = field(default_factory=dict)


@dataclass
class Encoded:
    """The documents of a batch by key, in order, without empty ones; counts and problems of the batch."""

    ids: dict[str, Ids]
    text_bytes: dict[str, int]
    empty: dict[str, int]
    nul: dict[str, int]
    special: dict[str, int]
    max_id: dict[str, int]
    bad: int
    problems: list[Problem]


@dataclass
class Report:
    """What one output holds (`bytes` of UTF-8 text) and what made it; written as PREFIX_KEY_document.json.

    `max_id` is the largest token id; `files` the suffix, "bin" or "idx", -> bytes, sha256 and, of a sample of the .bin,
    sampled_sha256; `problems` the list of bad, empty and odd records ("" if there is none).
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    bad_lines: int = 0
    empty_documents: int = 0
    documents_with_nul: int = 0
    documents_with_special_tokens: int = 0
    max_id: int = 0
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    dtype: str = ""
    backend: str = ""
    tokenizer: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: str = ""


def encode_batch(
    batch: Batch, keys: list[str], encode: Encoder, dtype: type[np.integer], limit: int, ends: Ends
) -> Encoded:
    """Read and encode one batch; a record that is bad for one key is left out for all.

    Args:
        limit: ids from here on are not in the vocabulary; a text that gives one is bad.
    Raises:
        ValueError: a document longer than an index can hold.
    """
    rows, indices, bad = batch.texts(keys)
    texts = {key: [row[column] for row in rows] for column, key in enumerate(keys)}
    ids: dict[str, Ids] = {}
    wrong: dict[int, str] = {}
    for key in keys:
        ids[key], reasons = _encode(texts[key], encode, limit)
        wrong |= {row: f"the text under {key!r} {reason}" for row, reason in reasons.items()}
    good = [row for row in range(len(rows)) if row not in wrong]
    bad += [(indices[row], reason) for row, reason in wrong.items()]
    odd = [(index, reason, "bad") for index, reason in bad]
    encoded = Encoded({}, {}, {}, {}, {}, {}, len(bad), [])
    for key in keys:
        used = [texts[key][row] for row in good]
        found = _without(ids[key], list(wrong))
        nul = [place for place, text in enumerate(used) if b"\0" in text]
        empty = [place for place, text in enumerate(used) if not text or not found.lengths[place]]
        special = find_special(found, ends.special)
        found = _without(found, empty)
        found = with_ends(found, ends.prefix, ends.suffix)
        if (found.lengths > MAX_TOKENS).any():
            raise ValueError(
                f"--input {batch.path}: a document of {found.lengths.max():,} tokens at or after {batch.place(0)}; an "
                f"index counts up to {MAX_TOKENS:,}: cut it"
            )
        encoded.ids[key] = Ids(found.ids.astype(dtype), found.lengths)
        encoded.max_id[key] = int(found.ids.max(initial=0))
        encoded.text_bytes[key] = sum(map(len, used))
        encoded.empty[key], encoded.nul[key], encoded.special[key] = len(empty), len(nul), len(special)
        odd += [(indices[good[place]], f"{key!r} is empty or gives no token", "empty") for place in empty]
        odd += [(indices[good[place]], f"{key!r} holds NUL characters", "kept") for place in nul]
        odd += [
            (indices[good[place]], f"{key!r} holds special tokens: {', '.join(tokens)}", "kept")
            for place, tokens in special.items()
        ]
    odd.sort(key=lambda entry: entry[0])  # so that the list does not depend on batch boundaries
    encoded.problems = [
        Problem(printable(batch.place(index)), printable(why)[:REASON_LENGTH], kind) for index, why, kind in odd
    ]
    return encoded


def _encode(texts: list[bytes], encode: Encoder, limit: int) -> tuple[Ids, dict[int, str]]:
    """The ids of all texts, and why some of these texts are bad, by their places."""
    reasons: dict[int, str] = {}
    try:
        found = encode(texts)
    except TextError:  # of one of them
        parts = []
        for place, text in enumerate(texts):
            try:
                parts.append(encode([text]).ids)
            except TextError as error:
                reasons[place] = str(error)
                parts.append(np.empty(0, np.int64))
        found = join(parts)
    if found.ids.size and (found.ids.max() >= limit or found.ids.min() < 0):
        owners = np.repeat(np.arange(len(texts)), found.lengths)
        outside = (found.ids >= limit) | (found.ids < 0)
        for place, number in zip(owners[outside].tolist(), found.ids[outside].tolist()):
            reasons.setdefault(place, f"gives the token id {number}, and those of the vocabulary end at {limit - 1}")
    return found, reasons


def _without(found: Ids, places: list[int]) -> Ids:
    if not places:
        return found
    kept = np.ones(len(found.lengths), bool)
    kept[places] = False
    return Ids(found.ids[np.repeat(kept, found.lengths)], found.lengths[kept])


def output_prefixes(output_prefix: str, keys: list[str], overwrite: bool) -> dict[str, str]:
    """Key -> prefix of its dataset, as Megatron's own preprocessing names them.

    Raises:
        ValueError: such a dataset exists and `overwrite` is off.
    """
    prefixes = {key: f"{output_prefix}_{key}_document" for key in keys}
    for prefix in prefixes.values():
        if not overwrite and Path(f"{prefix}.idx").exists():
            raise ValueError(f"--output-prefix: {prefix}.idx exists; choose another prefix, or pass --overwrite")
    return prefixes


def preprocess(
    files: list[Path],
    output_prefix: str,
    tokenizer: Any,
    *,
    keys: list[str],
    append_eod: bool,
    workers: int,
    max_bad_lines: int = MAX_BAD_LINES,
    overwrite: bool = False,
    backend: str = "auto",
    about_tokenizer: dict[str, Any] | None = None,
    sentences: SentenceSplitter | None = None,
    split_special_tokens: bool = False,
) -> dict[str, Report]:
    """Encode the records of `files` into one indexed dataset for each of `keys`.

    Args:
        tokenizer: as Megatron builds it (`data.tokenizer.build_tokenizer`).
        append_eod: end each document with `tokenizer.eod`, unless the tokenizer's template does.
        workers: threads that encode.
        max_bad_lines: bad records (malformed, not UTF-8, no text under a key, ids that the vocabulary lacks) that are
            skipped and listed; one more ends the run.
        backend: one of `encoders.BACKENDS`.
        about_tokenizer: what to write about the tokenizer into the reports, besides what documents begin and end with.
        sentences: encode each sentence of a document by itself.
        split_special_tokens: encode text that spells a special token as any other text; else it becomes the token, and
            is listed.
    Returns:
        Key -> report. The datasets are in place. On any error none of them is, and older ones are untouched; the
        progress saved until then stays in OUTPUT_PREFIX.unfinished, and the same call resumes from it.
    Raises:
        ValueError: too many bad records, a dataset that exists, a tokenizer without an end of document, no document.
    """
    from megatron.core.datasets.indexed_dataset import DType

    if append_eod and tokenizer.eod is None:
        raise ValueError("--append-eod: the tokenizer has no end-of-document (eos) token; name one in its config")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one thread must encode")
    if max_bad_lines < 0:
        raise ValueError(f"--max-bad-lines {max_bad_lines}: 0 stops at the first bad record, N at one more than N")
    files = _without_own(files, output_prefix, keys)
    check_keys(files, keys)
    limit = id_limit(tokenizer)
    dtype = DType.optimal_dtype(limit)
    # Parallelism comes from the threads below; the tokenizer's own pool would only compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoder = choose_encoder(tokenizer, backend, split_special_tokens)
    encode = encoder.encode if sentences is None else sentences.encoder(encoder.encode)
    eod: Any = getattr(tokenizer, "eod", None)
    ends = Ends(encoder.prefix, list(encoder.suffix), special_tokens(tokenizer))
    if append_eod and ends.suffix[-1:] != [eod]:
        ends.suffix.append(eod)
    eod = eod if ends.suffix[-1:] == [eod] else None

    base = Report(
        dtype=dtype.__name__,
        backend=encoder.backend,
        tokenizer=(about_tokenizer or {}) | {"document_start": ends.prefix, "eod": eod},
        inputs=[printable(str(path)) for path in files],
        problems=f"{output_prefix}_{PROBLEMS}",
    )
    job = {"input": describe(files), "json-keys": keys, "tokenizer": about_tokenizer or {}, "dtype": base.dtype}
    job |= {"document-start": ends.prefix or None, "eod": eod}
    job["split-special-tokens"] = split_special_tokens or None
    job["id-limit"] = limit
    job["split-sentences"] = None if sentences is None else [sentences.language, sentences.keep_newlines]
    streams = [f"{key}.{suffix}" for key in keys for suffix in ("bin", "lengths")]
    resume = ResumeState(Path(f"{output_prefix}.unfinished"), [*streams, PROBLEMS], job, restart=overwrite)
    complete = False
    try:
        finished = resume.state is not None and "finished" in resume.state
        prefixes = output_prefixes(output_prefix, keys, overwrite or finished)
        if not finished:
            _write_all(files, resume, base, workers, max_bad_lines, (keys, encode, dtype, limit, ends))
        assert resume.state is not None
        reports = {key: Report(**saved) for key, saved in resume.state["reports"].items()}
        for key, prefix in prefixes.items():
            binary, index = (resume.folder / f"{key}.{suffix}" for suffix in ("bin", "idx"))
            move_into_place(binary, index, prefix, asdict(reports[key]))
        _move_problems(resume.folder / PROBLEMS, Path(base.problems))
        complete = True
    finally:
        resume.close(keep=not complete and resume.state is not None)
    return reports


def _without_own(files: list[Path], output_prefix: str, keys: list[str]) -> list[Path]:
    """Drop from the inputs what this command writes below an input folder, or wrote before it was killed.

    Raises:
        ValueError: nothing else is left.
    """
    datasets = rf"_({'|'.join(map(re.escape, keys))})_document\.(bin|idx|json)"
    own = re.escape(os.path.abspath(output_prefix)) + rf"(\.unfinished/.*|{datasets}|_{PROBLEMS})"
    found = [path for path in files if not re.fullmatch(own, os.path.abspath(path), re.DOTALL)]
    if not found:
        raise ValueError(f"--input names only files that --output-prefix {output_prefix} wrote")
    return found


def _write_all(
    files: list[Path],
    resume: ResumeState,
    base: Report,
    workers: int,
    max_bad_lines: int,
    encode_args: tuple[Any, ...],
) -> None:
    """Encode and append all that follows the saved position; save regularly, and at the end, before the renames."""
    keys = encode_args[0]
    reports = {key: Report(**asdict(base)) for key in keys}
    start, done = Position(), 0
    if resume.state:
        start, done = Position(*resume.state["position"]), resume.state["done"]
        reports = {key: Report(**saved) for key, saved in resume.state["reports"].items()}
        if (bad := reports[keys[0]].bad_lines) > max_bad_lines:
            raise ValueError(
                f"--max-bad-lines {max_bad_lines}: the unfinished run {resume.folder} left out {bad:,} already: "
                "allow as many, or remove that folder to start over"
            )
    earlier = {key: report.seconds for key, report in reports.items()}
    started = saved_at = time.monotonic()
    total = sum(path.stat().st_size for path in files)
    with tqdm(total=total, initial=done, desc="preprocess", unit="B", unit_scale=True, disable=None) as progress:
        for batch, encoded in _encode_in_order(files, keys, start, workers, encode_args):
            _check_bad_lines(encoded, reports[keys[0]].bad_lines, max_bad_lines)
            now = time.monotonic()
            for key, report in reports.items():
                _append(resume, key, encoded, report)
                report.seconds = round(earlier[key] + now - started, 3)
                report.tokens_per_second = round(report.tokens / max(report.seconds, 1e-3))
            lines = (json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in encoded.problems)
            resume.files[PROBLEMS].write("".join(lines).encode())
            if now - saved_at >= SAVE_SECONDS:
                saved = {key: asdict(report) for key, report in reports.items()}
                resume.save(position=as_list(batch.end), done=batch.done, reports=saved)
                saved_at = now
            speed = sum(report.tokens_per_second for report in reports.values())
            progress.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            progress.update(batch.done - progress.n)
    for key, report in reports.items():
        if report.documents == 0:
            raise ValueError(_no_documents(key, report, resume.files[PROBLEMS]))
        resume.files[f"{key}.bin"].flush()
        resume.files[f"{key}.lengths"].flush()
        report.files = _finish(resume.folder, key, encode_args[2])
        if not resume.files[PROBLEMS].tell():
            report.problems = ""
    resume.save(finished=True, reports={key: asdict(report) for key, report in reports.items()})


def _check_bad_lines(encoded: Encoded, before: int, allowed: int) -> None:
    """Raises ValueError for the first bad record beyond the allowed number, independent of batch boundaries."""
    bad = [problem for problem in encoded.problems if problem.kind == "bad"]
    if before + len(bad) > allowed:
        last = bad[allowed - before]
        raise ValueError(
            f"--input {last.place}: {last.reason}. This is bad record {allowed + 1:,}, more than --max-bad-lines "
            f"{allowed} leaves out: correct the input or the flags, or allow more"
        )


def _no_documents(key: str, report: Report, problems: BinaryIO) -> str:
    problems.seek(0)
    first = json.loads(problems.readline() or "null")
    example = f", the first: {first['place']}: {first['reason']}" if first else ""
    return (
        f"--input holds no text under the key {key!r} ({report.bad_lines} bad records, {report.empty_documents} empty"
        f"{example})"
    )


def _finish(folder: Path, key: str, dtype: type[np.integer]) -> dict[str, dict[str, Any]]:
    """Write the .idx; returns sizes and checksums of .bin and .idx, by suffix."""
    write_index(folder / f"{key}.idx", np.memmap(folder / f"{key}.lengths", np.int32, "r"), dtype)
    check_index(folder / f"{key}.idx", folder / f"{key}.bin")
    return describe_files(folder / f"{key}.bin", folder / f"{key}.idx")


def _append(resume: ResumeState, key: str, encoded: Encoded, report: Report) -> None:
    found = encoded.ids[key]
    resume.files[f"{key}.bin"].write(found.ids.tobytes())
    resume.files[f"{key}.lengths"].write(found.lengths.astype(np.int32).tobytes())
    report.documents += len(found.lengths)
    report.tokens += len(found.ids)
    report.max_id = max(report.max_id, encoded.max_id[key])
    report.bytes += encoded.text_bytes[key]
    report.empty_documents += encoded.empty[key]
    report.documents_with_nul += encoded.nul[key]
    report.documents_with_special_tokens += encoded.special[key]
    report.bad_lines += encoded.bad


def _encode_in_order(
    files: list[Path], keys: list[str], start: Position, workers: int, encode_args: tuple[Any, ...]
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches in `workers` threads, a few ahead of the writer; yield them in input order."""
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


def describe_files(binary: Path, index: Path) -> dict[str, dict[str, Any]]:
    """Sizes and checksums of a .bin and its .idx, by suffix, as reports hold them."""
    found: dict[str, dict[str, Any]] = {}
    for suffix, path in {"bin": binary, "idx": index}.items():
        found[suffix] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    found["bin"]["sampled_sha256"] = sample_tokens(binary, np.dtype(np.uint8)).sha256
    return found


def move_into_place(binary: Path, index: Path, prefix: str, report: dict[str, Any]) -> None:
    """Move .bin, .json and last .idx into place, so that an .idx exists only with everything it points to."""
    if binary.exists():
        Path(f"{prefix}.idx").unlink(missing_ok=True)  # of an older .bin
    _replace(binary, f"{prefix}.bin")
    write_atomically(Path(f"{prefix}.json"), json.dumps(report, indent=1) + "\n")
    _replace(index, f"{prefix}.idx")
    descriptor = os.open(Path(prefix).parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # makes the renames durable
    finally:
        os.close(descriptor)


def _move_problems(source: Path, target: Path) -> None:
    """Move the list of problems; an empty one is not written, and one of older data is removed."""
    if source.exists() and source.stat().st_size == 0:
        target.unlink(missing_ok=True)
        return
    _replace(source, str(target))


def _replace(source: Path, target: str) -> None:
    """Move, unless an earlier run moved it before it was killed."""
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
