"""What tools/inspect_dataset.py shows of an indexed dataset: checksums, sample documents, document lengths."""

import random
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from yoco_megatron.corpus.output_files import file_sha256
from yoco_megatron.data.check import MAX_VOCABULARY, read_report
from yoco_megatron.data.tokenizer import build_tokenizer, id_limit, known_options, tokenizer_sha256


def verify(prefix: str) -> dict[str, str]:
    """Read .bin and .idx and compare their SHA-256 with the report's, if there is one; returns suffix -> SHA-256.

    Raises:
        ValueError: a file that changed.
    """
    recorded = read_report(prefix).get("files") or {}
    found = {suffix: file_sha256(Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx")}
    for suffix, file in recorded.items():
        if found.get(suffix) != file["sha256"]:
            raise ValueError(
                f"--verify: {prefix}.{suffix} has SHA-256 {found.get(suffix)}, not {file['sha256']}: copy it again"
            )
    return found


def ids_end(prefix: str, args: Namespace) -> int:
    """Ids of the vocabulary are below it: the tokenizer's that the flags name, or the report's, or any size's."""
    if args.tokenizer_type is not None:
        return id_limit(build_tokenizer(args))
    report = read_report(prefix)
    vocab_size = (report.get("tokenizer") or {}).get("vocab_size")
    return MAX_VOCABULARY if vocab_size is None else max(vocab_size, report.get("max_id", 0) + 1)


def tokenizer_for(prefix: str, args: Namespace) -> Any:
    """The tokenizer that the flags name, or without flags the one in the report.

    Raises:
        ValueError: neither names one, or it is not the one that made the data.
    """
    about = read_report(prefix).get("tokenizer") or {}
    if args.tokenizer_type is None:
        if not about.get("type"):
            raise ValueError(
                f"--samples: {prefix}.json names no tokenizer; give --tokenizer-type and --tokenizer-model"
            )
        args.tokenizer_type, args.tokenizer_model = about["type"], about["model"]
        vars(args).update(known_options(about.get("options", {})))
    ours, theirs = tokenizer_sha256(args.tokenizer_model), about.get("sha256")
    if ours and theirs and ours != theirs:
        raise ValueError(f"--tokenizer-model {args.tokenizer_model} did not make {prefix} (see {prefix}.json)")
    return build_tokenizer(args)


def random_documents(
    prefix: str, tokenizer: Any, count: int, seed: int, max_tokens: int
) -> Iterator[tuple[int, int, str]]:
    """(number, tokens, beginning of the text) of `count` documents drawn without repetition."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    for number in sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))):
        length = int(dataset.sequence_lengths[number])
        ids = dataset.get(number, length=min(length, max_tokens))
        yield number, length, tokenizer.detokenize(ids.tolist())


def document_lengths(prefix: str) -> np.ndarray:
    """Tokens of each document, int32 [documents]."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return dataset.sequence_lengths.copy()  # a view of a memory map, which the dataset closes when it is deleted


def describe_lengths(lengths: np.ndarray) -> str:
    """Shortest, quartiles, 99 %, longest, mean."""
    low, q1, median, q3, high = np.percentile(lengths, [0, 25, 50, 75, 99], method="lower")
    return (
        f"tokens per document: {low:,} to {lengths.max():,}, quartiles {q1:,} {median:,} {q3:,}, "
        f"99 % below {high:,}, mean {lengths.mean():,.1f}"
    )


def save_histogram(lengths: np.ndarray, path: Path, title: str) -> None:
    """Plot to a PNG how many documents, and which share of all tokens, have which length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edges = np.unique(np.geomspace(1, max(int(lengths.max()), 1) + 1, 61).astype(np.int64)).tolist()
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.hist(lengths, bins=edges, color="tab:blue", alpha=0.6)
    axes.set(xscale="log", xlabel="tokens per document", ylabel="documents", title=title)
    share = axes.twinx()
    share.hist(lengths, bins=edges, weights=lengths / lengths.sum(), histtype="step", color="tab:orange")
    share.set_ylabel("share of all tokens", color="tab:orange")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
