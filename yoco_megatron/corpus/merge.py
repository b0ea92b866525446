"""Concatenate indexed datasets of documents; the same bytes as Megatron's IndexedDatasetBuilder."""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from yoco_megatron.corpus.idx_writer import sync, write_index
from yoco_megatron.corpus.output_files import BLOCK_BYTES, describe_files, move_into_place
from yoco_megatron.data.check import check_data_prefixes, read_report
from yoco_megatron.data.idx import HEADER, Header, check_index, read_header

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
        if not Path(entry).is_dir():
            found.append(entry)
            continue
        inside = [str(path.with_suffix("")) for path in sorted(Path(entry).glob("*.idx"))]
        if not inside:
            raise ValueError(f"--input {entry} holds no .idx; give prefixes of datasets, or a folder of them")
        found += inside
    return found


def merge(prefixes: list[str], output: str, overwrite: bool = False) -> dict[str, Any]:
    """Write the datasets `prefixes`, in this order, to `output`, in constant memory.

    Returns:
        the report that is written beside the dataset, as tools/preprocess_data.py writes it.
    Raises:
        ValueError: an input that is missing or damaged, inputs that differ in dtype, tokenizer, or start or end of
            documents, or an output that exists.
    """
    check_data_prefixes(prefixes, "--input")
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

    dtype = dtypes[prefixes[0]].type
    max_id = 0
    binary, index, lengths = aside = [Path(f"{output}.{name}.tmp") for name in ("bin", "idx", "lengths")]
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    try:
        total = sum(Path(f"{prefix}.bin").stat().st_size for prefix in prefixes)
        with (
            binary.open("wb") as ids,
            lengths.open("wb") as counts,
            tqdm(total=total, desc="merge", unit="B", unit_scale=True, disable=None) as progress,
        ):
            for prefix in prefixes:
                with open(f"{prefix}.bin", "rb") as source:
                    while block := source.read(BLOCK_BYTES):
                        ids.write(block)
                        max_id = max(max_id, int(np.frombuffer(block, dtype).max()))
                        progress.update(len(block))
                counts.write(memoryview(_lengths(prefix, headers[prefix])))
            sync(ids)
            sync(counts)
        write_index(index, np.memmap(lengths, np.int32, "r"), dtype)
        check_index(index, binary)
        report = _merged(prefixes, reports, headers, dtype) | {"max_id": max_id}
        report["files"] = describe_files(binary, index)
        move_into_place(binary, index, output, report)
    finally:
        for path in aside:
            path.unlink(missing_ok=True)
    return report


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
    return sums | {"dtype": np.dtype(dtype).name, "tokenizer": known, "inputs": prefixes}
