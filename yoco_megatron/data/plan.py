"""What a run will read: samples, tokens and epochs of each source, counted as Megatron's dataset builder counts them.

Only the lengths in the .idx files are read; nothing is built.
"""

import math
from argparse import Namespace
from dataclasses import dataclass

import numpy as np

from yoco_megatron.data.blend import read_blends

# Megatron's, where --data-path is given without --split (training/arguments.py).
DEFAULT_SPLIT = "969, 30, 1"
# Below this share of an epoch GPTDataset shuffles the last epoch separately (datasets/gpt_dataset.py).
SEPARATE_BELOW = 0.80


@dataclass(frozen=True)
class Source:
    """The training part of one dataset.

    Args:
        weight: share of all samples.
        documents, tokens: of one epoch.
        samples: that the run draws from it.
        epochs: as many passes over its training part.
        order: (epochs that Megatron shuffles, whether the last one separately); with data, seed and sequence length it
            decides the order of the samples.
    """

    prefix: str
    weight: float
    documents: int
    tokens: int
    samples: int
    epochs: float
    order: tuple[int, bool]


def train_samples(args: Namespace) -> int:
    """Samples of the whole run, as Megatron's get_train_valid_test_num_samples counts them.

    Raises:
        ValueError: neither --train-samples nor --train-iters and --global-batch-size.
    """
    if args.train_samples:
        return args.train_samples
    if not args.train_iters or not args.global_batch_size:
        raise ValueError("--train-samples, or --train-iters and --global-batch-size, is missing: how long is the run?")
    return args.train_iters * args.global_batch_size


def plan(args: Namespace, samples: int) -> list[Source]:
    """The sources of training, in the order of the flags.

    Raises:
        ValueError: no data flag, or a source whose training part holds no token.
    """
    blend, per_split = read_blends(args)
    training = blend if per_split is None else per_split[0]
    if training is None:
        raise ValueError("--data-path is missing: mock data need no plan")
    prefixes, weights = training
    split = (args.split or DEFAULT_SPLIT) if blend is not None else None
    parts = [_training_part(prefix, split) for prefix in prefixes]
    for prefix, (_, tokens) in zip(prefixes, parts):
        if tokens <= args.seq_length:
            raise ValueError(f"--data-path {prefix}: its training part holds {tokens:,} tokens, less than one sample")
    if weights is None and len(prefixes) > 1:  # each source once; the run ends with them
        full = [(tokens - 1) // args.seq_length for _, tokens in parts]
        return [
            Source(prefix, own / sum(full), *part, own, own * args.seq_length / part[1], (1, False))
            for prefix, part, own in zip(prefixes, parts, full)
        ]
    shares = [1.0] if weights is None else [weight / sum(weights) for weight in weights]
    sources = []
    for prefix, part, share in zip(prefixes, parts, shares):
        own = math.ceil(samples * share)
        built = own if weights is None else math.ceil(own * (1 + args.mid_level_dataset_surplus))
        order = _order(built, part[1], args.seq_length)
        sources.append(Source(prefix, share, *part, own, own * args.seq_length / part[1], order))
    return sources


def _training_part(prefix: str, split: str | None) -> tuple[int, int]:
    """Documents and tokens; the whole dataset where a split has its own data (split None)."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from yoco_megatron.data.check import sequences_of

    dataset = IndexedDataset(prefix)
    first, end = sequences_of(len(dataset), split, None if split is None else "train")
    return end - first, int(dataset.sequence_lengths[first:end].sum(dtype=np.int64))


def _order(samples: int, tokens: int, seq_length: int) -> tuple[int, bool]:
    """`Source.order`, by GPTDataset._get_num_epochs and _build_document_sample_shuffle_indices."""
    epochs = max(1, math.ceil((samples * seq_length + 1) / tokens))
    if epochs == 1:
        return 1, False
    of_last = samples - ((epochs - 1) * tokens - 1) // seq_length
    return epochs, of_last < int(SEPARATE_BELOW * ((tokens - 1) // seq_length))


def table(sources: list[Source], seq_length: int, wanted: int) -> str:
    """The plan as a table, with a warning if samples run out. `wanted`: samples that the run needs."""
    rows = [("source", "weight", "documents", "tokens", "samples", "tokens read", "epochs")]
    rows += [
        (source.prefix, f"{source.weight:.4f}", f"{source.documents:,}", f"{source.tokens:,}",
         f"{source.samples:,}", f"{source.samples * seq_length:,}", f"{source.epochs:.2f}")
        for source in sources
    ]  # fmt: skip
    samples = sum(source.samples for source in sources)
    tokens = sum(source.tokens for source in sources)
    documents = sum(source.documents for source in sources)
    rows.append(("all", "1.0000", f"{documents:,}", f"{tokens:,}", f"{samples:,}", f"{samples * seq_length:,}",
                 f"{samples * seq_length / tokens:.2f}"))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in
                  enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]  # fmt: skip
    if samples < wanted:
        lines.append(
            f"sources without weights are read once: they end after {samples:,} of {wanted:,} samples; give weights "
            "(--data-path W1 P1 W2 P2 ...), or train less"
        )
    return "\n".join(lines)
