"""Cached indices of Megatron's datasets are read as what they are: arrays of numbers, whole.

Megatron unpickles them, with a list of allowed classes that leads to torch.load, and takes what a killed process left
of one: every later start ends with an error of memory maps.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yoco_megatron.data.index_arrays import DamagedIndexError, load_index
from yoco_megatron.upstream.registry import replaces

GPT_DATASET = "megatron.core.datasets.gpt_dataset"
BLENDED_DATASET = "megatron.core.datasets.blended_dataset"

# Samples that are looked at together.
BLOCK_SAMPLES = 1 << 20

repairs = functools.partial(replaces, in_every_process=True)


for _module, _calls in ((BLENDED_DATASET, 4), (GPT_DATASET, 6)):
    repairs(
        _module,
        "safe_numpy_load",
        digest="75521173bd1ef49e",
        calls=_calls,
        why="it unpickles what is no array of numbers; a cache folder may come from elsewhere",
    )(load_index)


def _built_again(build: Callable[..., Any], dataset: Any) -> Any:
    """`build(dataset)`; where a cached file is damaged, rank 0, which comes first, removes it and builds all again."""
    try:
        return build(dataset)
    except DamagedIndexError as damage:
        if dataset.config.fast_cache_load or not _is_first() or not os.access(damage.path.parent, os.W_OK):
            raise
        damage.path.unlink()
        return build(dataset)


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _reads_all(index: np.ndarray | None) -> bool:
    """Whether this process looks at the numbers of `index`: the first, where it comes from a cache."""
    return isinstance(index, np.memmap) and _is_first()


def _expect(whole: bool, path: Path, what: str) -> None:
    if not whole:
        raise DamagedIndexError(path, what)


def _is_permutation(index: np.ndarray) -> bool:
    """By the sum: what was never written to disk reads as zeros."""
    return int(index.sum(dtype=np.int64)) == len(index) * (len(index) - 1) // 2


@repairs(
    GPT_DATASET,
    "GPTDataset._build_document_sample_shuffle_indices",
    digest="ac9659147421227d",
    why="it takes the files that a killed process was writing for whole ones: every later start fails, or reads zeros",
)
def gpt_dataset_indices(self: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, sample, shuffle index); damaged files are built again."""

    def build(dataset: Any) -> Any:
        found = gpt_dataset_indices.original(dataset)
        documents, samples, shuffle = found
        if _reads_all(documents) and dataset.indices is not None:
            for index in (documents, shuffle):
                _expect(index.ndim == 1, Path(index.filename), "has two dimensions")
            epochs, rest = divmod(len(documents), max(len(dataset.indices), 1))
            numbers = int(dataset.indices.sum(dtype=np.int64))
            whole = rest == 0 and int(documents.sum(dtype=np.int64)) == epochs * numbers
            _expect(whole, Path(documents.filename), "is no order of the documents")
            whole = samples.ndim == 2 and samples.shape == (len(shuffle) + 1, 2) and _is_rising(samples)
            _expect(whole, Path(samples.filename), "does not rise from sample to sample")
            _expect(_is_permutation(shuffle), Path(shuffle.filename), "is no permutation of the samples")
        return found

    return _built_again(build, self)


def _is_rising(samples: np.ndarray) -> bool:
    """Whether no sample begins before the one before it; [samples + 1, 2] of (document's place, offset)."""
    for first in range(0, len(samples) - 1, BLOCK_SAMPLES):
        place, offset = np.diff(samples[first : first + BLOCK_SAMPLES + 1].astype(np.int64), axis=0).T
        if ((place < 0) | (place == 0) & (offset < 0)).any():
            return False
    return True


@repairs(
    BLENDED_DATASET,
    "BlendedDataset._build_indices",
    digest="ad183e7e07871c61",
    why="as GPTDataset's: what a killed process was writing is taken for whole",
)
def blended_dataset_indices(self: Any) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, sample in it) of each sample; damaged files are built again."""

    def build(dataset: Any) -> Any:
        found = blended_dataset_indices.original(dataset)
        sources, samples = found
        if _reads_all(sources):
            size = int(sum(dataset.weights)) if dataset.size is None else dataset.size
            known = sources.shape == (size,) and sources.min() >= 0 and sources.max() < len(dataset.datasets)
            _expect(known, Path(sources.filename), "is no order of the datasets")
            # Each dataset's samples are counted from 0.
            expected = sum(count * (count - 1) // 2 for count in np.bincount(sources).tolist())
            whole = samples.shape == (size,) and int(samples.sum(dtype=np.int64)) == expected
            _expect(whole, Path(samples.filename), "does not count the samples of each dataset")
        return found

    return _built_again(build, self)
