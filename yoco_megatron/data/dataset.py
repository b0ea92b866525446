"""The samples of a run: Megatron's GPTDataset, with caches that belong to the content, checked ids, and own masks.

It may also pack whole documents.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from yoco_megatron.data.index_arrays import load_index, save_index
from yoco_megatron.data.loss_masks import mask_of
from yoco_megatron.data.packing import is_packed, pack

# No limit.
MAX_ID = 2**63 - 1
# That no text holds.
NO_ID = -1


class UnknownTokenError(ValueError):
    """A token id that the vocabulary does not have.

    A data-loading process hands its whole traceback to the trainer as the message: the error is its last line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rsplit(f"{type(self).__name__}: ", 1)[-1])


@dataclass
class DatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig, and what `CheckedGPTDataset` knows of the data."""

    id_limit: int = MAX_ID
    """Token ids of the vocabulary are below it."""

    index_sha256: dict[str, str] = field(default_factory=dict, repr=False)
    """Prefix -> SHA-256 of its .idx, where known."""

    masked: Sequence[str] = ()
    """Prefixes of the datasets that have a loss mask beside them."""

    sample_packing: str | None = None
    """--sample-packing."""

    loss_suffix: int | None = None
    """Last tokens of a sample, which alone have a loss; None: no limit."""


class CheckedGPTDataset(GPTDataset):
    """GPTDataset whose samples depend on the data and the flags alone, not on paths, old caches or other samples.

    A sample of packed documents holds whole ones, cut to --seq-length, then padding, which is a document, too.
    """

    config: DatasetConfig

    def __init__(self, indexed_dataset: Any, dataset_path: str | None, *others: Any) -> None:
        """As GPTDataset's, which names its cached indices by `dataset_path`: here the content of the .idx names them.

        Lengths and flags alone decide an index, so that the .bin need not be read.
        """
        config, content = others[-1], dataset_path
        if dataset_path is not None:
            known = config.index_sha256.get(dataset_path)
            content = known or hashlib.sha256(indexed_dataset.index.bin_buffer).hexdigest()
        self.loss_masks = None
        if dataset_path is not None and dataset_path in config.masked:
            self.loss_masks = IndexedDataset(mask_of(dataset_path), mmap=config.mmap_bin_files)
        self.is_packed = is_packed(config.sample_packing, self.loss_masks is not None)
        super().__init__(indexed_dataset, content, *others)
        self.dataset_path = dataset_path
        # Megatron would keep the first sample's loss mask, and with it the padding of that sample, for all others.
        self.masks_and_position_ids_are_cacheable = False
        if self.is_packed or self.loss_masks is not None:
            # Padding is known by its place. Megatron would find its id in texts, too: a template may end answers by it.
            self._pad_token_id = NO_ID

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """What the names of caches depend on, too: not on the tokenizer, which is known by its path."""
        return [name for name in GPTDataset._key_config_attributes() if name != "tokenizer"]

    def __len__(self) -> int:
        return len(self.sample_index) - 1 if self.is_packed else super().__len__()

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Megatron's sample with its `loss_mask`, float [sequence], set to 0 at labels that the data do not teach, and
        before the suffix that has a loss.

        With packed documents, or inter_document_masking and eod_mask_loss, also at each document's last token, whose
        label is not of the same document: Megatron goes by the end-of-document token, and data may have none.
        """
        sample = super().__getitem__(idx)
        if idx is None:
            return sample
        loss_mask = sample["loss_mask"].numpy()
        documents, offset, lengths = self._parts(idx)
        if self.is_packed or (self.config.inter_document_masking and self.config.eod_mask_loss):
            ends = np.cumsum(lengths)
            loss_mask[ends[(ends > 0) & (ends <= len(loss_mask))] - 1] = 0.0
        if self.loss_masks is not None:
            learned = _read(self.loss_masks, documents, offset, lengths)[1:]
            loss_mask[: len(learned)][learned == 0] = 0.0
        if self.config.loss_suffix is not None:
            loss_mask[: -self.config.loss_suffix] = 0.0
        return sample

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Megatron's indices; of packed documents those of `pack` and None, from the same cache by the same rules."""
        if not self.is_packed:
            return super()._build_document_sample_shuffle_indices()
        config = self.config
        if config.mock:
            return *self._pack(), None
        folder = Path(config.path_to_cache or Path(self.dataset.path_prefix, "cache", "packed"))
        name = f"{self.unique_description_hash}-{self.index_split.name}-packed"
        paths = [folder / f"{name}-{part}.npy" for part in ("documents", "samples")]
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if is_first and not config.fast_cache_load and not all(path.exists() for path in paths):
            for path, index in zip(paths, self._pack()):
                save_index(path, index)
        documents, samples = (load_index(str(path)) for path in paths)
        return documents, samples, None

    def _pack(self) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.dataset.sequence_lengths[self.indices]
        return pack(self.indices, lengths, self.config.sequence_length, self.num_samples, self.config.random_seed)

    def _parts(self, idx: int) -> tuple[np.ndarray, int, np.ndarray]:
        """(documents of a sample, tokens of the first one that are left out, tokens of each that are read)."""
        if self.is_packed:
            documents = self.document_index[self.sample_index[idx] : self.sample_index[idx + 1]]
            return documents, 0, np.minimum(self.dataset.sequence_lengths[documents], self.config.sequence_length)
        place = int(self.shuffle_index[idx])
        (first, offset), (last, tokens) = self.sample_index[place : place + 2].tolist()
        documents = self.document_index[first : last + 1]
        lengths = self.dataset.sequence_lengths[documents]
        lengths[-1] = tokens + 1  # with the last label
        lengths[0] -= offset
        return documents, offset, lengths

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Megatron's (tokens int64 [sequence + 1], documents, tokens of each document before padding), all ids known.

        Raises:
            UnknownTokenError: an id that the vocabulary lacks. With tensor parallelism Megatron would train on it.
        """
        if self.is_packed:
            documents, offset, of_each = self._parts(idx)
            text, lengths = _read(self.dataset, documents, offset, of_each), of_each.tolist()
        else:
            text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        read = text[: sum(lengths)]
        if read.view(np.uint64).max() >= self.config.id_limit:  # also where an id is negative
            place = int(np.argmax(read.view(np.uint64) >= self.config.id_limit))
            document = documents[np.searchsorted(np.cumsum(lengths), place, "right")]
            raise UnknownTokenError(
                f"--data-path {self.dataset_path}: document {document:,} holds the token id {read[place]}, but the "
                f"vocabulary ends at {self.config.id_limit - 1:,}: give the tokenizer that made the data"
            )
        if self.is_packed:  # padding as a document, of which the extra token behind the sequence is one
            padding = self.config.sequence_length + 1 - len(text)
            text = np.pad(text, (0, padding), constant_values=self._pad_token_id)
            lengths.append(padding)
        return text, documents, lengths


def _read(dataset: Any, documents: np.ndarray, offset: int, lengths: np.ndarray) -> np.ndarray:
    """Numbers of the documents, one after the other, int64: of the first those behind `offset`, of each so many."""
    offsets = [offset] + [0] * (len(documents) - 1)
    parts = map(dataset.get, documents.tolist(), offsets, lengths.tolist())
    return np.concatenate(list(parts), dtype=np.int64)


class CheckedMockDataset(CheckedGPTDataset, MockGPTDataset):
    """Megatron's mock data, as checked as the others."""
