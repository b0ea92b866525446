"""Which predictions are in the loss where documents meet, with and without a token that ends them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from yoco_megatron.data.boundary_loss_mask import BoundaryMaskedGPTDataset
from yoco_megatron.data.provider import dataset_kind

EOD, PAD, LENGTH = 0, 1, 16


def samples(folder: Path, kind: type[GPTDataset], ended: bool) -> GPTDataset:
    """Documents of 1 to 20 tokens, several epochs; all the samples."""
    generator = np.random.default_rng(3)
    builder = IndexedDatasetBuilder(str(folder / "d.bin"), dtype=np.uint16)
    for _ in range(50):
        ids = generator.integers(2, 99, generator.integers(1, 21))
        ids = np.append(ids, EOD) if ended else ids
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(folder / "d.idx"))
    tokenizer = SimpleNamespace(eod=EOD, pad=PAD, vocab_size=99, unique_identifiers={"class": "none"})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=LENGTH, blend=([str(folder / "d")], None), split="100,0,0", tokenizer=tokenizer,
        path_to_cache=str(folder / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=True, create_attention_mask=False, inter_document_masking=True,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(kind, [90, 0, 0], lambda: True, config).build()[0]


@pytest.mark.parametrize("ended", [True, False])
def test_only_labels_of_the_own_document_are_in_the_loss(tmp_path: Path, ended: bool) -> None:
    """Against the stream of documents, counted one by one."""
    data = samples(tmp_path, BoundaryMaskedGPTDataset, ended)
    lengths = data.dataset.sequence_lengths
    owner = np.concatenate([np.full(lengths[document], n) for n, document in enumerate(data.document_index)])
    last = []
    for index in range(len(data)):
        begin = int(data.shuffle_index[index]) * LENGTH
        here = owner[begin : begin + LENGTH + 1]
        assert data[index]["loss_mask"].tolist() == (here[1:] == here[:-1]).tolist()
        last.append(data[index]["loss_mask"][-1].item())
    assert 0 < sum(last) < len(last)  # both kinds of last token are among them
    assert data[None]["loss_mask"].sum() == 0


def test_with_ends_it_is_megatrons_mask(tmp_path: Path) -> None:
    ours, theirs = (samples(tmp_path, kind, ended=True) for kind in (BoundaryMaskedGPTDataset, GPTDataset))
    for index in range(len(ours)):
        own, other = ours[index], theirs[index]
        assert all((own[name] == other[name]).all() for name in other) and own.keys() == other.keys()


def test_without_ends_megatrons_mask_is_of_ones(tmp_path: Path) -> None:
    data = samples(tmp_path, GPTDataset, ended=False)
    assert all(data[index]["loss_mask"].all() for index in range(len(data)))


@pytest.mark.parametrize(("apart", "masked"), [(True, True), (True, False), (False, True)])
def test_kind_by_flags(apart: bool, masked: bool) -> None:
    args = SimpleNamespace(dataloader_inter_document_masking=apart, eod_mask_loss=masked)
    assert (dataset_kind(args) is BoundaryMaskedGPTDataset) == (apart and masked)
