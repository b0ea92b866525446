"""From a corpus to Megatron's indexed datasets: PREFIX_NAME_document.bin and .idx, one document a record.

    read (this thread) -> Batch -> encode (worker threads) -> Encoded -> write (this thread, in the order of the input)

Threads are enough: the tokenizers release Python's lock. A killed run resumes where it last saved, and its
output has the same bytes as that of an undisturbed run.
"""

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

from yoco_megatron.corpus.chat_template import ChatTemplate
from yoco_megatron.corpus.conversations import Conversations, Prompts
from yoco_megatron.corpus.documents import DocumentEncoder, Encoded, Records, printable
from yoco_megatron.corpus.formats import FORMATS, document_encoder
from yoco_megatron.corpus.idx_writer import write_index
from yoco_megatron.corpus.output_files import (
    describe_files,
    describe_mask,
    move_into_place,
    output_prefixes,
    replace,
)
from yoco_megatron.corpus.readers import Batch, Position, as_list, check_keys, describe, read_batches
from yoco_megatron.corpus.resume_state import ResumeState
from yoco_megatron.corpus.sentences import SentenceSplitter
from yoco_megatron.data.idx import check_index
from yoco_megatron.data.loss_masks import mask_of
from yoco_megatron.utils.progress import progress

# Time between two saves of the progress.
SAVE_SECONDS = 10.0
PROBLEMS = "problems.jsonl"
# Bad records that are skipped before the run stops: a torn line should not stop it, a wrong --json-keys should.
MAX_BAD_LINES = 1000


@dataclass
class Report:
    """What one output holds (`bytes` of UTF-8 text) and what made it; written as PREFIX_NAME_document.json.

    `format` is the kind of records; `max_id` the largest token id; `files` the suffix, "bin" or "idx", -> bytes, sha256
    and, of a sample of the .bin, sampled_sha256; `loss_mask` the same of the mask beside the tokens with the number and
    share of learned tokens (None: all are); `problems` the list of bad, empty and odd records ("" if there is none).
    """

    format: str = "text"
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
    loss_mask: dict[str, Any] | None = None
    problems: str = ""


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
    data_format: str = "text",
) -> dict[str, Report]:
    """Encode the records of `files` into indexed datasets: one for each of `keys` of texts, else one of documents whose
    answers are learned, with its loss mask.

    Args:
        keys: of a record's texts, or as `Prompts` and `Conversations` read them.
        tokenizer: as Megatron builds it (`data.tokenizer.build_tokenizer`).
        append_eod: end each document with `tokenizer.eod`, unless a template does; completions always end with it.
        workers: threads that encode.
        max_bad_lines: bad records (malformed, not UTF-8, no text under a key, ids that the vocabulary lacks) that are
            skipped and listed; one more ends the run.
        backend: one of `encoders.BACKENDS`.
        about_tokenizer: what to write about the tokenizer into the reports, besides what documents begin and end with.
        sentences: encode each sentence of a document by itself.
        split_special_tokens: encode text that spells a special token as any other text; else it becomes the token, and
            is listed.
        data_format: one of FORMATS.
    Returns:
        Name of the dataset (of texts the key) -> report. The datasets are in place. On any error none of them is, and
        older ones are untouched; the progress saved until then stays in OUTPUT_PREFIX.unfinished, and the same call
        resumes from it.
    Raises:
        ValueError: too many bad records, a dataset that exists, a tokenizer without an end of document or without a
            template that is needed, no document.
    """
    if (append_eod or data_format == Prompts.kind) and tokenizer.eod is None:
        what = "--append-eod" if append_eod else f"--data-format {data_format}"
        raise ValueError(f"{what}: the tokenizer has no end-of-document (eos) token; name one in its config")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one thread must encode")
    if max_bad_lines < 0:
        raise ValueError(f"--max-bad-lines {max_bad_lines}: 0 stops at the first bad record, N at one more than N")
    if data_format not in FORMATS:
        raise ValueError(f"--data-format {data_format}: choose one of {', '.join(FORMATS)}")
    names = keys if data_format == "text" else [data_format]
    files = _without_own(files, output_prefix, names)
    check_keys(files, keys)
    # Parallelism comes from the threads below; the tokenizer's own pool would only compete with them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    template = ChatTemplate(tokenizer) if data_format == Conversations.kind else None
    encoder, backend = document_encoder(
        tokenizer,
        keys,
        template,
        data_format=data_format,
        append_eod=append_eod,
        backend=backend,
        sentences=sentences,
        split_special_tokens=split_special_tokens,
    )
    ends = encoder.ends
    eod = ends.suffix[-1] if ends.suffix[-1:] == [getattr(tokenizer, "eod", None)] else None
    start = None if template else ends.prefix  # the template decides, not the tokenizer
    made = {"document_start": start, "eod": eod} | ({"chat_template_sha256": template.sha256} if template else {})
    base = Report(
        format=data_format,
        dtype=encoder.dtype.__name__,
        backend=backend,
        tokenizer=(about_tokenizer or {}) | made,
        inputs=[printable(str(path)) for path in files],
        loss_mask={"learned_tokens": 0} if encoder.records.is_masked else None,
        problems=f"{output_prefix}_{PROBLEMS}",
    )
    job = {"input": describe(files), "json-keys": keys, "tokenizer": about_tokenizer or {}, "dtype": base.dtype}
    job |= {"document-start": start or None, "eod": eod}
    job["split-special-tokens"] = split_special_tokens or None
    job["id-limit"] = encoder.limit
    job["split-sentences"] = None if sentences is None else [sentences.language, sentences.keep_newlines]
    job["data-format"] = None if data_format == "text" else data_format
    job["chat-template"] = template and template.sha256
    streams = [f"{name}.{suffix}" for name in names for suffix in ("bin", "lengths")]
    streams += [f"{mask_of(name)}.bin" for name in names if encoder.records.is_masked]
    resume = ResumeState(Path(f"{output_prefix}.unfinished"), [*streams, PROBLEMS], job, restart=overwrite)
    complete = False
    try:
        finished = resume.state is not None and "finished" in resume.state
        prefixes = output_prefixes(output_prefix, names, overwrite or finished)
        if not finished:
            _write_all(files, resume, base, workers, max_bad_lines, encoder)
        assert resume.state is not None
        reports = {name: Report(**saved) for name, saved in resume.state["reports"].items()}
        for name, prefix in prefixes.items():
            tokens, mask = _written(resume.folder, name, reports[name].loss_mask is not None)
            move_into_place(*tokens, prefix, asdict(reports[name]), mask)
        _move_problems(resume.folder / PROBLEMS, Path(base.problems))
        complete = True
    finally:
        resume.close(keep=not complete and resume.state is not None)
    return reports


def _written(folder: Path, name: str, is_masked: bool) -> tuple[tuple[Path, Path], tuple[Path, Path] | None]:
    """The .bin and .idx of the tokens, and those of the loss mask."""
    tokens, mask = ((folder / f"{stem}.bin", folder / f"{stem}.idx") for stem in (name, mask_of(name)))
    return tokens, mask if is_masked else None


def _without_own(files: list[Path], output_prefix: str, names: list[str]) -> list[Path]:
    """Drop from the inputs what this command writes below an input folder, or wrote before it was killed.

    Raises:
        ValueError: nothing else is left.
    """
    datasets = rf"_({'|'.join(map(re.escape, names))})_document({mask_of('')})?\.(bin|idx|json)"
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
    encoder: DocumentEncoder,
) -> None:
    """Encode and append all that follows the saved position; save regularly, and at the end, before the renames."""
    first, *_ = names = encoder.records.names
    reports = {name: Report(**asdict(base)) for name in names}
    start, done = Position(), 0
    if resume.state:
        start, done = Position(*resume.state["position"]), resume.state["done"]
        reports = {name: Report(**saved) for name, saved in resume.state["reports"].items()}
        if (bad := reports[first].bad_lines) > max_bad_lines:
            raise ValueError(
                f"--max-bad-lines {max_bad_lines}: the unfinished run {resume.folder} left out {bad:,} already: "
                "allow as many, or remove that folder to start over"
            )
    earlier = {name: report.seconds for name, report in reports.items()}
    started = saved_at = time.monotonic()
    total = sum(path.stat().st_size for path in files)
    with progress(total=total, initial=done, desc="preprocess", unit="B", unit_scale=True) as bar:
        for batch, encoded in _encode_in_order(files, start, workers, encoder):
            _check_bad_lines(encoded, reports[first].bad_lines, max_bad_lines)
            now = time.monotonic()
            for name, report in reports.items():
                _append(resume, name, encoded, report)
                report.seconds = round(earlier[name] + now - started, 3)
                report.tokens_per_second = round(report.tokens / max(report.seconds, 1e-3))
            lines = (json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in encoded.problems)
            resume.files[PROBLEMS].write("".join(lines).encode())
            if now - saved_at >= SAVE_SECONDS:
                saved = {name: asdict(report) for name, report in reports.items()}
                resume.save(position=as_list(batch.end), done=batch.done, reports=saved)
                saved_at = now
            speed = sum(report.tokens_per_second for report in reports.values())
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update(batch.done - bar.n)
    for name, report in reports.items():
        if report.documents == 0:
            raise ValueError(_no_documents(encoder.records, name, report, resume.files[PROBLEMS]))
        for stream in resume.files.values():
            stream.flush()
        _finish(resume.folder, name, encoder.dtype, report)
        if not resume.files[PROBLEMS].tell():
            report.problems = ""
    resume.save(finished=True, reports={name: asdict(report) for name, report in reports.items()})


def _check_bad_lines(encoded: Encoded, before: int, allowed: int) -> None:
    """Raises ValueError for the first bad record beyond the allowed number, independent of batch boundaries."""
    bad = [problem for problem in encoded.problems if problem.kind == "bad"]
    if before + len(bad) > allowed:
        last = bad[allowed - before]
        raise ValueError(
            f"--input {last.place}: {last.reason}. This is bad record {allowed + 1:,}, more than --max-bad-lines "
            f"{allowed} leaves out: correct the input or the flags, or allow more"
        )


def _no_documents(records: Records, name: str, report: Report, problems: BinaryIO) -> str:
    problems.seek(0)
    first = json.loads(problems.readline() or "null")
    example = f", the first: {first['place']}: {first['reason']}" if first else ""
    what = "answer" if records.is_masked else "text"
    key = repr(records.keys[-1] if records.is_masked else name)
    return (
        f"--input holds no {what} under the key {key} ({report.bad_lines} bad records, {report.empty_documents} empty"
        f"{example})"
    )


def _finish(folder: Path, name: str, dtype: type[np.integer], report: Report) -> None:
    """Write the .idx files; report sizes and checksums."""
    lengths = np.memmap(folder / f"{name}.lengths", np.int32, "r")
    tokens, mask = _written(folder, name, report.loss_mask is not None)
    for (binary, index), of in ((tokens, dtype), (mask, np.uint8)) if mask else ((tokens, dtype),):
        write_index(index, lengths, of)
        check_index(index, binary)
    report.files = describe_files(*tokens)
    if mask and report.loss_mask:
        report.loss_mask = describe_mask(*mask, report.loss_mask["learned_tokens"], report.tokens)


def _append(resume: ResumeState, name: str, encoded: Encoded, report: Report) -> None:
    found = encoded.tokens[name]
    resume.files[f"{name}.bin"].write(found.ids.tobytes())
    resume.files[f"{name}.lengths"].write(found.lengths.astype(np.int32).tobytes())
    if report.loss_mask is not None and found.learned is not None:
        resume.files[f"{mask_of(name)}.bin"].write(found.learned.tobytes())
        report.loss_mask["learned_tokens"] += int(found.learned.sum(dtype=np.int64))
    report.documents += len(found.lengths)
    report.tokens += len(found.ids)
    report.max_id = max(report.max_id, int(found.ids.max(initial=0)))
    report.bytes += encoded.text_bytes[name]
    report.empty_documents += encoded.empty[name]
    report.documents_with_nul += encoded.nul[name]
    report.documents_with_special_tokens += encoded.special[name]
    report.bad_lines += encoded.bad


def _encode_in_order(
    files: list[Path], start: Position, workers: int, encoder: DocumentEncoder
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches in `workers` threads, a few ahead of the writer; yield them in input order."""
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
    try:
        for batch in read_batches(files, encoder.records.columns, start):
            waiting.append((batch, pool.submit(encoder.encode_batch, batch)))
            if len(waiting) > 2 * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _move_problems(source: Path, target: Path) -> None:
    """Move the list of problems; an empty one is not written, and one of older data is removed."""
    if source.exists() and source.stat().st_size == 0:
        target.unlink(missing_ok=True)
        return
    replace(source, str(target))
