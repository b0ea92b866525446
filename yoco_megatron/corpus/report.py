"""What tools/inspect_dataset.py shows of an indexed dataset: checksums, sample documents, document lengths."""

import random
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from yoco_megatron.corpus.output_files import BLOCK_BYTES, file_sha256
from yoco_megatron.data.check import MAX_VOCABULARY, read_report
from yoco_megatron.data.loss_masks import has_mask, mask_of
from yoco_megatron.data.tokenizer import build_tokenizer, id_limit, known_options, tokenizer_sha256

LEARNED = "⟦{}⟧"


def recorded_sha256(prefix: str) -> dict[str, str | None]:
    """File of a dataset and its loss mask, without the prefix -> the SHA-256 in the report, or None."""
    report = read_report(prefix)
    parts = {"": report.get("files")}
    if has_mask(prefix):
        parts[mask_of("")] = (report.get("loss_mask") or {}).get("files")
    return {
        f"{part}.{suffix}": ((files or {}).get(suffix) or {}).get("sha256")
        for part, files in parts.items()
        for suffix in ("bin", "idx")
    }


def verify(prefix: str) -> dict[str, str]:
    """Read all files and compare their SHA-256 with the report's, if there is one; returns file -> SHA-256.

    Raises:
        ValueError: a file that changed.
    """
    found = {}
    for file, recorded in recorded_sha256(prefix).items():
        found[file] = file_sha256(Path(prefix + file))
        if recorded not in (None, found[file]):
            raise ValueError(f"--verify: {prefix}{file} has SHA-256 {found[file]}, not {recorded}: copy it again")
    return found


def learned_tokens(prefix: str) -> int | None:
    """How many tokens its loss mask has learned; None without one."""
    if not has_mask(prefix):
        return None
    flags = np.memmap(f"{mask_of(prefix)}.bin", np.uint8, "r")
    return sum(int(np.count_nonzero(flags[at : at + BLOCK_BYTES])) for at in range(0, len(flags), BLOCK_BYTES))


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
    """(number, tokens, beginning of the text) of `count` documents drawn without repetition.

    What is learned by a loss mask is put between LEARNED.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    masks = IndexedDataset(mask_of(prefix)) if has_mask(prefix) else None
    for number in sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset)))):
        length = int(dataset.sequence_lengths[number])
        ids = dataset.get(number, length=min(length, max_tokens))
        if masks is None:
            yield number, length, tokenizer.detokenize(ids.tolist())
            continue
        flags = masks.get(number, length=len(ids))
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(flags)) + 1)
        texts = ((tokenizer.detokenize(ids[run].tolist()), flags[run].any()) for run in runs)
        yield number, length, "".join(LEARNED.format(text) if learned else text for text, learned in texts)


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
