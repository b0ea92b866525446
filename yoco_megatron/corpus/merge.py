"""Concatenate indexed datasets of documents; the same bytes as Megatron's IndexedDatasetBuilder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from yoco_megatron.corpus.idx_writer import sync, write_index
from yoco_megatron.corpus.output_files import BLOCK_BYTES, describe_files, describe_mask, move_into_place
from yoco_megatron.data.check import check_data_prefixes, read_report
from yoco_megatron.data.idx import HEADER, Header, check_index, read_header
from yoco_megatron.data.loss_masks import check_masks, has_mask, mask_of
from yoco_megatron.utils.progress import progress

TEMPLATE = "chat_template_sha256"
# Counts of a report that are summed.
SUMS = (
    "documents",
    "tokens",
    "bytes",
    "bad_lines",
    "empty_documents",
    "documents_with_nul",
    "documents_with_special_tokens",
)


def find_prefixes(inputs: list[str]) -> list[str]:
    """Prefixes of indexed datasets: those given, and for a folder all datasets directly in it, sorted by name.

    Raises:
        ValueError: a folder without datasets.
    """
    found: list[str] = []
    for entry in inputs:
        # A prefix may also be a folder's name: GPTDataset keeps its cache there.
        if Path(f"{entry}.idx").is_file() or not Path(entry).is_dir():
            found.append(entry)
            continue
        names = {str(path.with_suffix("")) for path in Path(entry).glob("*.idx")}
        inside = sorted(names - set(map(mask_of, names)))
        if not inside:
            raise ValueError(f"--input {entry} holds no .idx; give prefixes of datasets, or a folder of them")
        found += inside
    return found


def merged_prefix(prefixes: list[str], output: str) -> str:
    """`output` with the ending that all inputs have, as `_text_document`, by which preprocessing names datasets."""
    endings = {re.search(r"_[^_/]+_document$|$", prefix)[0] for prefix in prefixes}  # type: ignore[index]
    ending = endings.pop() if len(endings) == 1 else ""
    return output if output.endswith(ending) else f"{output}{ending}"


def merge(prefixes: list[str], output: str, overwrite: bool = False) -> dict[str, Any]:
    """Write the datasets `prefixes`, in this order, to `output`, with their loss masks, in constant memory.

    Returns:
        the report that is written beside the dataset, as tools/preprocess_data.py writes it.
    Raises:
        ValueError: an input that is missing or damaged, inputs that differ in dtype, tokenizer, chat template, start or
            end of documents, or of which some alone have a loss mask, or an output that exists.
    """
    check_data_prefixes(prefixes, "--input")
    check_masks(prefixes, "--input")
    if Path(f"{output}.idx").exists() and not overwrite:
        raise ValueError(f"--output-prefix: {output}.idx exists; choose another prefix, or pass --overwrite")
    if str(Path(output).resolve()) in {str(Path(prefix).resolve()) for prefix in prefixes}:
        raise ValueError(f"--output-prefix {output} is one of the inputs; choose another prefix")
    headers = {prefix: read_header(Path(f"{prefix}.idx")) for prefix in prefixes}
    reports = [read_report(prefix) for prefix in prefixes]
    dtypes = {prefix: header.dtype for prefix, header in headers.items()}
    _require_one(dtypes, "dtype", "datasets of one tokenizer have one")
    hashes = {prefix: report.get("tokenizer", {}).get("sha256") for prefix, report in zip(prefixes, reports)}
    _require_one({prefix: sha for prefix, sha in hashes.items() if sha}, "tokenizer", "its SHA-256 is in the .json")
    ends = {
        prefix: report["tokenizer"].get("eod") for prefix, report in zip(prefixes, reports) if report.get("tokenizer")
    }
    _require_one(ends, "end of document", "preprocess all with --append-eod, or none")
    starts = {prefix: report.get("tokenizer", {}).get("document_start") for prefix, report in zip(prefixes, reports)}
    known = {prefix: tuple(start) for prefix, start in starts.items() if start is not None}
    _require_one(known, "document start", "preprocess all with --tokenizer-hf-no-include-special-tokens, or none")

    templates = {prefix: report.get("tokenizer", {}).get(TEMPLATE) for prefix, report in zip(prefixes, reports)}
    _require_one({prefix: sha for prefix, sha in templates.items() if sha}, "chat template", "preprocess all with one")
    masked = [prefix for prefix in prefixes if has_mask(prefix)]
    if masked and (bare := [prefix for prefix in prefixes if prefix not in masked]):
        raise ValueError(f"--input: {masked[0]} has a loss mask, {bare[0]} has none: merge them separately")

    dtype = dtypes[prefixes[0]].type
    aside = [Path(f"{part}.{suffix}.tmp") for part in (output, mask_of(output)) for suffix in ("bin", "idx", "lengths")]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    largest, learned = [0], [0]
    try:
        tokens = _concatenate(prefixes, aside[:3], dtype, lambda ids: largest.append(int(ids.max())))
        report = _merged(prefixes, reports, headers, dtype) | {"max_id": max(largest)}
        report["files"] = describe_files(*tokens)
        mask = None
        if masked:
            masks = list(map(mask_of, prefixes))
            mask = _concatenate(masks, aside[3:], np.uint8, lambda flags: learned.append(int(np.count_nonzero(flags))))
            report["loss_mask"] = describe_mask(*mask, sum(learned), report["tokens"])
        move_into_place(*tokens, output, report, mask)
    finally:
        for path in aside:
            path.unlink(missing_ok=True)
    return report


def _concatenate(
    prefixes: list[str], aside: list[Path], dtype: type[np.integer], see: Callable[[np.ndarray], None]
) -> tuple[Path, Path]:
    """Write the datasets to the .bin, .idx and lengths `aside`; `see` is shown all values. Returns .bin and .idx."""
    binary, index, lengths = aside
    total = sum(Path(f"{prefix}.bin").stat().st_size for prefix in prefixes)
    with (
        binary.open("wb") as ids,
        lengths.open("wb") as counts,
        progress(total=total, desc="merge", unit="B", unit_scale=True) as bar,
    ):
        for prefix in prefixes:
            with open(f"{prefix}.bin", "rb") as source:
                while block := source.read(BLOCK_BYTES):
                    ids.write(block)
                    see(np.frombuffer(block, dtype))
                    bar.update(len(block))
            counts.write(memoryview(_lengths(prefix, read_header(Path(f"{prefix}.idx")))))
        sync(ids)
        sync(counts)
    write_index(index, np.memmap(lengths, np.int32, "r"), dtype)
    check_index(index, binary)
    return binary, index


def _require_one(values: dict[str, Any], what: str, advice: str) -> None:
    if len(set(values.values())) > 1:
        first, *_ = values
        other = next(prefix for prefix in values if values[prefix] != values[first])
        raise ValueError(
            f"--input: {first} has {what} {str(values[first])[:12]}, {other} has {str(values[other])[:12]}; {advice}"
        )


def _lengths(prefix: str, header: Header) -> np.ndarray:
    return np.memmap(f"{prefix}.idx", np.int32, "r", HEADER.size, (header.sequences,))


def _merged(
    prefixes: list[str], reports: list[dict[str, Any]], headers: dict[str, Header], dtype: type[np.integer]
) -> dict[str, Any]:
    """The merged report. Text counts need a report of each dataset; documents and tokens are always known."""
    sums = {name: sum(report[name] for report in reports) for name in SUMS if all(name in report for report in reports)}
    sums["documents"] = sum(headers[prefix].sequences for prefix in prefixes)
    sums["tokens"] = sum(Path(f"{prefix}.bin").stat().st_size for prefix in prefixes) // np.dtype(dtype).itemsize
    tokenizers = [report["tokenizer"] for report in reports if report.get("tokenizer")]
    known = tokenizers[0] if len(tokenizers) == len(reports) else {}
    formats = {report.get("format") for report in reports}
    kind = formats.pop() if len(formats) == 1 else "mixed"
    return sums | {"format": kind, "dtype": np.dtype(dtype).name, "tokenizer": known, "inputs": prefixes}
