"""Small indexed datasets, and the samples that a run would draw from them."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from yoco_megatron.data.dataset import CheckedGPTDataset, DatasetConfig

EOD, PAD, LENGTH = 0, 1, 16


def write(
    prefix: Path,
    documents: Sequence[Any],
    dtype: type[np.integer] = np.uint16,
    loss_masks: Sequence[Any] | None = None,
) -> str:
    """A dataset of the documents' ids, with a loss mask beside it where numbers of each document are given."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(np.asarray(ids, dtype), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    if loss_masks is not None:
        write(Path(f"{prefix}_loss_mask"), loss_masks, np.uint8)
    return str(prefix)


def build(
    prefix: str, kind: type[GPTDataset] = CheckedGPTDataset, size: int | None = 90, pad: int = PAD, **flags: object
) -> Any:
    """At least `size` samples of LENGTH tokens, in whole epochs; None is one."""
    tokenizer = SimpleNamespace(eod=EOD, pad=pad, vocab_size=99, unique_identifiers={"class": "none"})
    about = dict(
        random_seed=1, sequence_length=LENGTH, blend=([prefix], None), split="100,0,0", tokenizer=tokenizer,
        path_to_cache=str(Path(prefix).parent / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(kind, [size, 0, 0], lambda: True, DatasetConfig(**about | flags)).build()[0]
