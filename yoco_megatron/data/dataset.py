"""The samples of a run: Megatron's GPTDataset, with caches that belong to the content, checked ids, and own masks."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

# No limit.
MAX_ID = 2**63 - 1


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


class CheckedGPTDataset(GPTDataset):
    """GPTDataset whose samples depend on the data and the flags alone, not on paths, old caches or other samples."""

    config: DatasetConfig

    def __init__(self, indexed_dataset: Any, dataset_path: str | None, *others: Any) -> None:
        """As GPTDataset's, which names its cached indices by `dataset_path`: here the content of the .idx names them.

        Lengths and flags alone decide an index, so that the .bin need not be read.
        """
        content = dataset_path
        if dataset_path is not None:
            known = others[-1].index_sha256.get(dataset_path)
            content = known or hashlib.sha256(indexed_dataset.index.bin_buffer).hexdigest()
        super().__init__(indexed_dataset, content, *others)
        self.dataset_path = dataset_path
        # Megatron would keep the first sample's loss mask, and with it the padding of that sample, for all others.
        self.masks_and_position_ids_are_cacheable = False

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """What the names of caches depend on, too: not on the tokenizer, which is known by its path."""
        return [name for name in GPTDataset._key_config_attributes() if name != "tokenizer"]

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Megatron's (tokens int64 [sequence + 1], documents, tokens of each document before padding), all ids known.

        Raises:
            UnknownTokenError: an id that the vocabulary lacks. With tensor parallelism Megatron would train on it.
        """
        text, documents, lengths = super()._query_document_sample_shuffle_indices(idx)
        read = text[: sum(lengths)]
        if read.view(np.uint64).max() >= self.config.id_limit:  # also where an id is negative
            place = int(np.argmax(read.view(np.uint64) >= self.config.id_limit))
            document = documents[np.searchsorted(np.cumsum(lengths), place, "right")]
            raise UnknownTokenError(
                f"--data-path {self.dataset_path}: document {document:,} holds the token id {read[place]}, but the "
                f"vocabulary ends at {self.config.id_limit - 1:,}: give the tokenizer that made the data"
            )
        return text, documents, lengths


class BoundaryMaskedGPTDataset(CheckedGPTDataset):
    """With inter_document_masking and eod_mask_loss: masks by document boundaries.

    The loss of each document's last token, whose label would be the first token of the next document. Megatron masks by
    the end-of-document token, and finds none in data made without one.
    """

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Megatron's sample with `loss_mask`, float [sequence], set to 0 at each document's last token."""
        sample = super().__getitem__(idx)
        length, ends = self.config.sequence_length, sample["cu_seqlens"]
        sample["loss_mask"][ends[(ends > 0) & (ends < length)].long() - 1] = 0.0
        # The label of the last token is the first token of the next sample in the stream of documents.
        if idx is not None and self.sample_index[self.shuffle_index[idx] + 1][1] == 0:
            sample["loss_mask"][-1] = 0.0
        return sample


class CheckedMockDataset(CheckedGPTDataset, MockGPTDataset):
    """Megatron's mock data, as checked as the others."""
