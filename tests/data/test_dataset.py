"""What a sample holds: its own masks, known ids, documents of the data that lie there now."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from support.datasets import EOD, LENGTH, PAD, build, write

from yoco_megatron.data.check import index_of
from yoco_megatron.data.dataset import (
    CheckedGPTDataset,
    CheckedMockDataset,
    DatasetConfig,
    UnknownTokenError,
)


def samples(folder: Path, kind: type[GPTDataset], ended: bool) -> GPTDataset:
    """Documents of 1 to 20 tokens."""
    generator = np.random.default_rng(3)
    documents = [generator.integers(2, 99, generator.integers(1, 21)) for _ in range(50)]
    prefix = write(folder / "d", [np.append(ids, EOD) if ended else ids for ids in documents])
    return build(prefix, kind, eod_mask_loss=True, inter_document_masking=True)


@pytest.mark.parametrize("ended", [True, False])
def test_only_labels_of_the_own_document_are_in_the_loss(tmp_path: Path, ended: bool) -> None:
    """Against the stream of documents, counted one by one."""
    data = samples(tmp_path, CheckedGPTDataset, ended)
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
    ours, theirs = (samples(tmp_path, kind, ended=True) for kind in (CheckedGPTDataset, GPTDataset))
    for index in range(len(ours)):
        own, other = ours[index], theirs[index]
        assert all((own[name] == other[name]).all() for name in other) and own.keys() == other.keys()


def test_without_ends_megatrons_mask_is_of_ones(tmp_path: Path) -> None:
    data = samples(tmp_path, GPTDataset, ended=False)
    assert all(data[index]["loss_mask"].all() for index in range(len(data)))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_a_sample_is_the_same_whatever_was_read_before(tmp_path: Path, apart: bool, by_token: bool) -> None:
    """Documents with padding in them; a resumed process reads other samples first."""
    generator = np.random.default_rng(4)
    prefix = write(tmp_path / "d", [generator.integers(0, 9, generator.integers(1, 30)) for _ in range(40)])
    kind = CheckedGPTDataset
    data = build(prefix, kind, inter_document_masking=apart, eod_mask_loss=by_token)
    for index in range(len(data) - 1, -1, -1):
        alone = build(prefix, kind, inter_document_masking=apart, eod_mask_loss=by_token)[index] if index < 5 else {}
        sample = data[index]
        begin = int(data.shuffle_index[index]) * LENGTH
        stream = np.concatenate([data.dataset[document] for document in data.document_index])
        labels = stream[begin + 1 : begin + LENGTH + 1]
        if not by_token:
            assert sample["loss_mask"].tolist() == (labels != PAD).tolist()
        assert all(torch.equal(sample[name], alone[name]) for name in alone)


def test_mock_samples_do_not_share_a_mask_either() -> None:
    tokenizer = SimpleNamespace(eod=EOD, pad=5, vocab_size=99, unique_identifiers={"class": "none"})
    config = DatasetConfig(
        random_seed=1, sequence_length=LENGTH, split="100,0,0", tokenizer=tokenizer, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    data = BlendedMegatronDatasetBuilder(CheckedMockDataset, [40, 0, 0], lambda: True, config).build()[0]
    masks = [data[index]["loss_mask"] for index in range(40)]
    assert len({tuple(mask.tolist()) for mask in masks}) > 2
    assert torch.equal(masks[-1], data[39]["loss_mask"])


def test_caches_belong_to_the_content(tmp_path: Path) -> None:
    """Other documents under the old name are read; the old ones under another name need no new cache."""
    prefix = write(tmp_path / "d", [np.arange(2, 12)] * 20)
    assert set(build(prefix, CheckedGPTDataset).document_index) == set(range(20))
    write(tmp_path / "d", [np.arange(2, 12)] * 70)
    assert set(build(prefix, CheckedGPTDataset).document_index) == set(range(70))
    write(tmp_path / "d", [np.arange(2, 7), np.arange(2, 17)] * 35)  # as many documents, tokens and bytes
    data = build(prefix, CheckedGPTDataset)
    assert all(len(data[index]["tokens"]) == LENGTH for index in range(len(data)))
    cached = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(cached) == 3 * 4

    (tmp_path / "elsewhere").mkdir()
    for suffix in ("bin", "idx"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / "elsewhere" / f"other.{suffix}")
    moved = str(tmp_path / "elsewhere" / "other")
    build(moved, CheckedGPTDataset, path_to_cache=str(tmp_path / "cache"), index_sha256={moved: index_of(moved).sha256})
    assert {path.name for path in (tmp_path / "cache").iterdir()} == cached


@pytest.mark.parametrize(("dtype", "number"), [(np.uint16, 99), (np.int32, -1), (np.int32, 2**31 - 1)])
def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path, dtype: type[np.integer], number: int) -> None:
    documents = [np.arange(2, 12)] * 20
    prefix = write(tmp_path / "d", [*documents[:13], np.array([3, 4, number, 5]), *documents], dtype)
    data = build(prefix, CheckedGPTDataset, id_limit=99)
    pattern = rf"^--data-path {prefix}: document 13 holds the token id {number}, but the vocabulary ends at 98"
    with pytest.raises(UnknownTokenError, match=pattern):
        [data[index] for index in range(len(data))]
    with pytest.raises(UnknownTokenError, match=pattern):  # not with a process's traceback before it
        list(torch.utils.data.DataLoader(data, 30, num_workers=1))
    if number > 0:
        other = build(prefix, CheckedGPTDataset, id_limit=number + 1)
        assert max(int(other[index]["tokens"].max()) for index in range(len(other))) == number


def test_empty_documents_between_others(tmp_path: Path) -> None:
    empty = np.array([], np.uint16)
    prefix = write(tmp_path / "d", [np.arange(2, 7), empty, np.arange(3, 9), empty, empty] * 9)
    data = build(prefix, CheckedGPTDataset, eod_mask_loss=True, inter_document_masking=True)
    for index in range(20):
        sample = data[index]
        starts = (sample["position_ids"] == 0).nonzero().flatten()
        ends = sample["cu_seqlens"].unique()
        assert ends.tolist() == [*starts.tolist(), LENGTH]
        assert set(np.flatnonzero(sample["loss_mask"].numpy()[:-1] == 0)) == set((ends[1:-1] - 1).tolist())


@pytest.mark.parametrize("read", [{}, {"mmap_bin_files": False}, {"defer_npy_index_mmap": True}])
def test_a_loss_mask_beside_the_data_is_of_the_labels(tmp_path: Path, read: dict[str, bool]) -> None:
    """In a stream, which cuts documents: against the streams of both, counted one by one, also where a label is
    the padding token."""
    generator = np.random.default_rng(6)
    lengths = generator.integers(0, 40, 30)
    documents = [generator.integers(PAD, 99, length) for length in lengths]
    masks = [generator.integers(0, 2, length) for length in lengths]
    prefix = write(tmp_path / "d", documents, loss_masks=masks)
    built = build(prefix, size=60)  # by the flags of deferred reading it must be there
    data = build(prefix, size=60, masked=[prefix], sample_packing="stream", **read)
    assert len(data) == len(built)
    for index in range(len(data)):
        sample = data[index]
        begin = int(data.shuffle_index[index]) * LENGTH
        labels, learned = (
            np.concatenate([one[document] for document in data.document_index])[begin + 1 : begin + LENGTH + 1]
            for one in (documents, masks)
        )
        assert (sample["labels"].tolist(), sample["loss_mask"].tolist()) == (labels.tolist(), learned.tolist())


def test_a_suffix_of_what_the_data_teach(tmp_path: Path) -> None:
    masks = [[1, 0, 1] * 9] * 5
    prefix = write(tmp_path / "d", [range(2, 29)] * 5, loss_masks=masks)
    whole, cut = (build(prefix, masked=[prefix], loss_suffix=tokens) for tokens in (None, 5))
    for index in range(len(whole)):
        before, after = (data[index]["loss_mask"].tolist() for data in (whole, cut))
        assert any(before[:-5]) and after == [0.0] * (LENGTH - 5) + before[-5:]
