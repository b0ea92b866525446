"""What a run will read: samples, tokens and epochs of each source, counted as Megatron's dataset builder counts them.

Only the lengths in the .idx files are read; nothing is built.
"""

import math
from argparse import Namespace
from dataclasses import dataclass

import numpy as np

from yoco_megatron.data.blend import read_blends
from yoco_megatron.data.loss_masks import has_mask
from yoco_megatron.data.packing import best_fit, is_packed, number_of_samples
from yoco_megatron.utils.text_table import aligned

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
        padding: share of its samples that is none of its tokens: 0 where documents are a stream.
        order: (epochs that Megatron shuffles, whether the last one separately); with data, seed and sequence length it
            decides the order of the samples.
    """

    prefix: str
    weight: float
    documents: int
    tokens: int
    samples: int
    epochs: float
    padding: float
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
    parts = [epoch_of(args, prefix, split, None if split is None else "train") for prefix in prefixes]
    for prefix, part in zip(prefixes, parts):
        if part.samples < 1:
            raise ValueError(
                f"--data-path {prefix}: its training part holds {part.tokens:,} tokens, less than one sample"
            )
    once = weights is None and len(prefixes) > 1  # each source once; the run ends with them
    if once:
        weights = [part.samples for part in parts]
    shares = [1.0] if weights is None else [weight / sum(weights) for weight in weights]
    sources = []
    for prefix, part, share in zip(prefixes, parts, shares):
        own = part.samples if once else math.ceil(samples * share)
        built = own if weights is None else math.ceil(own * (1 + args.mid_level_dataset_surplus))
        order = (1, False) if once or part.is_packed else _order(built, part.tokens, args.seq_length)
        epochs = own / part.samples if part.is_packed else own * args.seq_length / part.tokens
        sources.append(Source(prefix, share, part.documents, part.tokens, own, epochs, part.padding, order))
    return sources


@dataclass(frozen=True)
class Epoch:
    """One pass over a part of a dataset.

    Args:
        samples: whole ones.
        longer: numbers of packed documents that are longer than --seq-length, int64 [documents].
        cut: their tokens behind it, which are left out.
    """

    documents: int
    tokens: int
    samples: int
    seq_length: int
    is_packed: bool
    longer: np.ndarray
    cut: int

    @property
    def padding(self) -> float:
        """Share of the samples."""
        return 1 - (self.tokens - self.cut) / (self.samples * self.seq_length) if self.is_packed else 0.0


def epoch_of(args: Namespace, prefix: str, split: str | None, part: str | None) -> Epoch:
    """What one pass over a part of a dataset yields; of the whole dataset where split and part are None."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from yoco_megatron.data.check import sequences_of

    dataset, length = IndexedDataset(prefix), args.seq_length
    first, end = sequences_of(len(dataset), split, part)
    lengths = dataset.sequence_lengths[first:end]
    tokens = int(lengths.sum(dtype=np.int64))
    if not is_packed(args.sample_packing, has_mask(prefix)):
        return Epoch(end - first, tokens, (tokens - 1) // length, length, False, np.zeros(0, np.int64), 0)
    (longer,) = np.nonzero(lengths > length)
    samples = number_of_samples(best_fit(lengths, length))
    cut = int(lengths[longer].sum(dtype=np.int64)) - len(longer) * length
    return Epoch(end - first, tokens, samples, length, True, first + longer, cut)


def _order(samples: int, tokens: int, seq_length: int) -> tuple[int, bool]:
    """`Source.order`, by GPTDataset._get_num_epochs and _build_document_sample_shuffle_indices."""
    epochs = max(1, math.ceil((samples * seq_length + 1) / tokens))
    if epochs == 1:
        return 1, False
    of_last = samples - ((epochs - 1) * tokens - 1) // seq_length
    return epochs, of_last < int(SEPARATE_BELOW * ((tokens - 1) // seq_length))


def table(sources: list[Source], seq_length: int, wanted: int) -> str:
    """The plan as a table, with a warning if samples run out. `wanted`: samples that the run needs."""
    rows = [("source", "weight", "documents", "tokens", "samples", "tokens read", "epochs", "padding")]
    rows += [
        (source.prefix, f"{source.weight:.4f}", f"{source.documents:,}", f"{source.tokens:,}",
         f"{source.samples:,}", f"{source.samples * seq_length:,}", f"{source.epochs:.2f}", f"{source.padding:.2%}")
        for source in sources
    ]  # fmt: skip
    samples = sum(source.samples for source in sources)
    tokens = sum(source.tokens for source in sources)
    documents = sum(source.documents for source in sources)
    epochs = sum(source.epochs * source.tokens for source in sources) / tokens
    padding = sum(source.samples * source.padding for source in sources)
    rows.append(("all", "1.0000", f"{documents:,}", f"{tokens:,}", f"{samples:,}", f"{samples * seq_length:,}",
                 f"{epochs:.2f}", f"{padding / samples:.2%}"))  # fmt: skip
    text = aligned(rows)
    if samples < wanted:
        text += (
            f"\nsources without weights are read once: they end after {samples:,} of {wanted:,} samples; give weights "
            "(--data-path W1 P1 W2 P2 ...), or train less"
        )
    return text
