"""Which tokens of a dataset are learned: a second indexed dataset beside it, as tools/preprocess_data.py writes it.

PREFIX_loss_mask.bin, .idx    uint8, a number for each token of PREFIX.bin: 1 is a target with a loss, 0 is none
"""

from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from yoco_megatron.data.check import THREADS, check_files, check_size, data_prefixes_from_args, index_of, read_report
from yoco_megatron.data.idx import HEADER, read_header
from yoco_megatron.data.packing import is_packed
from yoco_megatron.data.token_sample import sample_tokens

SUFFIX = "_loss_mask"
# Of the lengths in two .idx, which are compared.
BLOCK_BYTES = 1 << 22


def mask_of(prefix: str) -> str:
    """The prefix of the mask beside a dataset, whether there is one or not."""
    return prefix + SUFFIX


def has_mask(prefix: str) -> bool:
    """Half a mask is one, too: what is missing of it is an error, not a dataset without."""
    return any(_file(prefix, suffix).is_file() for suffix in ("idx", "bin"))


def masked_prefixes(args: Namespace) -> list[str]:
    """The datasets of a run that have a mask beside them."""
    return [prefix for prefix in data_prefixes_from_args(args) if has_mask(prefix)]


def all_prefixes(args: Namespace) -> list[str]:
    """The datasets of a run, then their masks."""
    return [*data_prefixes_from_args(args), *map(mask_of, masked_prefixes(args))]


def resolve(args: Namespace) -> None:
    """Fill in what follows from the masks, in place: `has_loss_masks`, and that packed documents are kept apart.

    Raises:
        ValueError: see `blend.read_blends`.
    """
    args.has_loss_masks = bool(masked_prefixes(args))
    if args.architecture == "yoco":  # the baseline has no document masks
        args.dataloader_inter_document_masking |= is_packed(args.sample_packing, args.has_loss_masks)


def check_masks(prefixes: Sequence[str], flag: str = "--data-path", inside: bool = True) -> None:
    """Check that the mask of each dataset that has one, or should, is whole and fits the tokens.

    Args:
        flag: the one that named the datasets.
        inside: compare all lengths, and look at a sample of the mask. False: only headers and sizes.
    Raises:
        ValueError: the first mask that is wrong, or is not there although the report has one, or is given as data.
    """
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda prefix: _check(prefix, inside), prefixes))
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def learned_behind(prefix: str, documents: np.ndarray, tokens: int) -> int:
    """How many of the documents, int [documents], have labels with a loss, but none in their first so many tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    masks = map(IndexedDataset(mask_of(prefix)).get, documents.tolist())
    return sum(mask[tokens:].any() and not mask[1:tokens].any() for mask in masks)


def _file(prefix: str, suffix: str) -> Path:
    return Path(f"{mask_of(prefix)}.{suffix}")


def _check(prefix: str, inside: bool) -> None:
    of = prefix.removesuffix(SUFFIX)
    if of != prefix and Path(f"{of}.idx").is_file():
        raise ValueError(f"{prefix} is the loss mask of {of}: give that one")
    recorded = read_report(prefix).get("loss_mask")
    if recorded is None and not has_mask(prefix):
        return
    idx, binary = _file(prefix, "idx"), _file(prefix, "bin")
    again = f"copy {idx.name} and {binary.name} again"
    for path in (idx, binary):
        if not path.is_file():
            raise ValueError(f"{path} is missing: {again}")
    header = read_header(idx)
    if header.dtype != np.uint8:
        raise ValueError(f"{idx} holds {header.dtype.name}, and a loss mask is of uint8: {again}")
    if header.sequences != (expected := read_header(Path(f"{prefix}.idx")).sequences):
        raise ValueError(f"{idx} has {header.sequences:,} documents, and {prefix}.idx {expected:,}: {again}")
    if not inside:
        check_size(idx, binary)
        return
    content = index_of(mask_of(prefix))
    _check_lengths(prefix, header.sequences, again)
    check_files(mask_of(prefix), content, (recorded or {}).get("files"), f"{prefix}.json")
    largest = sample_tokens(binary, header.dtype).largest
    if largest > 1:
        raise ValueError(f"{binary} holds the number {largest}, and a loss mask 0 and 1: {again}")
    if not largest and not (binary.stat().st_size and np.memmap(binary, np.uint8, "r").any()):
        raise ValueError(
            f"{binary} is 0 everywhere, so that nothing is learned: leave {prefix} out, or make another mask"
        )


def _check_lengths(prefix: str, documents: int, again: str) -> None:
    with Path(f"{prefix}.idx").open("rb") as tokens, _file(prefix, "idx").open("rb") as mask:
        for first in range(0, 4 * documents, BLOCK_BYTES):
            size = min(BLOCK_BYTES, 4 * documents - first)
            wanted, found = (_lengths(stream, first, size) for stream in (tokens, mask))
            if (wanted != found).any():
                bad = int(np.argmax(wanted != found))
                raise ValueError(
                    f"{mask_of(prefix)}.idx: document {first // 4 + bad:,} has {found[bad]:,} numbers, and "
                    f"{wanted[bad]:,} tokens in {prefix}.idx: {again}"
                )


def _lengths(idx: BinaryIO, first: int, size: int) -> np.ndarray:
    idx.seek(HEADER.size + first)
    return np.frombuffer(idx.read(size), "<i4")
