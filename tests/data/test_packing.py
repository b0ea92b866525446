"""Whole documents in samples: best fit, every document once an epoch, none sees another, none is cut but at the end."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.datasets import EOD, LENGTH, build, write

from yoco_megatron.data.packing import best_fit, number_of_samples, pack

PACKED = {"sample_packing": "documents", "inter_document_masking": True}


def test_each_document_goes_where_the_least_room_is_left() -> None:
    """6 opens a sample and 5 another; 4 fills the first one; 3 and 2 fit into the second; 12 counts as 10."""
    patterns = best_fit(np.array([2, 12, 3, 0, 6, 5, 4, 0], np.int32), 10)
    assert sorted(patterns) == [(1, [(5, 1), (3, 1), (2, 1)]), (1, [(6, 1), (4, 1)]), (1, [(10, 1)])]
    # 7 leaves 3 and 6 leaves 4: 3 goes to the smaller room, although the other one has it, too.
    assert sorted(best_fit(np.array([3, 6, 7]), 10)) == [(1, [(6, 1)]), (1, [(7, 1), (3, 1)])]


def naive(lengths: np.ndarray, capacity: int) -> list[int]:
    """Rooms that best fit leaves, longest first, document by document."""
    rooms: list[int] = []
    for length in sorted((min(length, capacity) for length in lengths.tolist() if length), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [1, 7, 64, 1000])
def test_documents_of_one_length_at_a_time_fit_as_one_by_one(capacity: int) -> None:
    generator = np.random.default_rng(capacity)
    for scale in (0.05, 0.3, 1.5):
        lengths = generator.integers(0, max(2, int(scale * capacity)), 400).astype(np.int32)
        patterns = best_fit(lengths, capacity)
        rooms = [
            capacity - sum(length * each for length, each in held) for count, held in patterns for _ in range(count)
        ]
        assert sorted(rooms) == naive(lengths, capacity)


def test_every_epoch_holds_every_document_once() -> None:
    generator = np.random.default_rng(5)
    numbers, lengths = np.arange(100, 400, dtype=np.int32), generator.integers(0, 30, 300).astype(np.int32)
    documents, samples = pack(numbers, lengths, 64, None, seed=1)
    of_one = number_of_samples(best_fit(lengths, 64))
    more_documents, more_samples = pack(numbers, lengths, 64, 2 * of_one + 1, seed=1)
    assert len(samples) - 1 == of_one and len(more_samples) - 1 == 3 * of_one
    # A longer run begins with the same samples.
    assert (more_documents[: len(documents)] == documents).all() and (more_samples[: len(samples)] == samples).all()
    of_number = dict(zip(numbers.tolist(), np.minimum(lengths, 64).tolist()))
    epochs = []
    for epoch in range(3):
        bounds = more_samples[epoch * of_one : (epoch + 1) * of_one + 1]
        held = more_documents[bounds[0] : bounds[-1]]
        assert sorted(held.tolist()) == [number for number, length in of_number.items() if length]
        parts = [more_documents[first:end].tolist() for first, end in itertools.pairwise(bounds)]
        assert all(0 < sum(map(of_number.__getitem__, part)) <= 64 for part in parts)
        epochs.append({frozenset(part) for part in parts})
    assert len(epochs[0] & epochs[1]) < of_one / 2  # other documents meet
    assert not np.array_equal(pack(numbers, lengths, 64, None, seed=2)[0], documents)


def documents() -> list[np.ndarray]:
    """Of 1 to 40 tokens, each of its own numbers, which say where they belong; some without tokens."""
    lengths = np.random.default_rng(3).integers(0, 41, 40)
    return [100 * number + 100 + np.arange(length) for number, length in enumerate(lengths)]


def packed(folder: Path, masks: list[np.ndarray] | None = None, size: int | None = 20, **flags: Any) -> Any:
    prefix = write(folder / "d", documents(), np.int32, masks)
    return build(prefix, size=size, masked=[] if masks is None else [prefix], **PACKED | flags)


@pytest.mark.parametrize(
    "read", [{}, {"mmap_bin_files": False}, {"pad": 303}], ids=["", "without mmap", "pad in texts"]
)
def test_samples_hold_whole_documents_their_masks_and_padding(tmp_path: Path, read: dict[str, Any]) -> None:
    """Against the documents, token by token. Padding is a document of its own, and has no loss."""
    generator = np.random.default_rng(4)
    of_token = [generator.integers(0, 2, len(ids)).astype(np.uint8) for ids in documents()]
    assert documents()[2][3] == 303 and of_token[2][3]
    data = packed(tmp_path, of_token, **read)
    plain = packed(tmp_path, **read)
    assert len(data) == len(plain)
    for index in range(len(data)):
        sample, unmasked = data[index], plain[index]
        tokens, learned, own = sample["tokens"].numpy(), [], []
        for first, end in itertools.pairwise(sample["cu_seqlens"].unique().tolist()):
            number, size = tokens[first] // 100 - 1, end - first
            if number < 0:
                assert end == LENGTH and not tokens[first:].any()
                learned, own = learned + [0] * size, own + [0] * size
                continue
            document = documents()[number][:LENGTH]
            assert tokens[first:end].tolist() == document.tolist()  # from its first token, whole
            assert sample["labels"][first : end - 1].tolist() == document[1:].tolist()
            assert sample["position_ids"][first:end].tolist() == list(range(size))
            learned, own = [*learned, *of_token[number][1:size].tolist(), 0], own + [1] * (size - 1) + [0]
        assert (sample["loss_mask"].tolist(), unmasked["loss_mask"].tolist()) == (learned, own)
    assert data[None]["loss_mask"].sum() == 0


def test_cut_documents_lose_their_end_alone(tmp_path: Path) -> None:
    """LENGTH tokens have LENGTH - 1 labels of their own: the next one is not learned, though the document has it."""
    prefix = write(tmp_path / "d", [np.arange(2, 50)])
    (sample,) = list(build(prefix, size=1, **PACKED))
    assert sample["tokens"].tolist() == list(range(2, 2 + LENGTH))
    assert sample["loss_mask"].tolist() == [1] * (LENGTH - 1) + [0]


def test_a_document_that_fills_a_sample_or_is_one_token(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", [np.arange(2, 2 + LENGTH), np.array([5]), np.arange(20, 20 + LENGTH - 1)])
    data = build(prefix, size=None, **PACKED)
    assert len(data) == 2
    full, two = sorted((data[0], data[1]), key=lambda sample: len(sample["cu_seqlens"].unique()))
    assert full["cu_seqlens"].unique().tolist() == [0, LENGTH]
    assert full["loss_mask"].tolist() == [1] * (LENGTH - 1) + [0]
    assert two["cu_seqlens"].unique().tolist() == [0, LENGTH - 1, LENGTH] and two["tokens"][-1] == 5
    assert two["loss_mask"].tolist() == [1] * (LENGTH - 2) + [0, 0]


@pytest.mark.filterwarnings("ignore:The pad token id")
def test_an_end_of_document_that_is_also_padding_is_learned(tmp_path: Path) -> None:
    """As many tokenizers have it: padding is known by its place."""
    prefix = write(tmp_path / "d", [[5, 6, EOD], [7, EOD]], loss_masks=[[0, 0, 1], [0, 1]])
    (sample,) = build(prefix, size=1, masked=[prefix], pad=EOD, **PACKED)
    assert sample["loss_mask"].tolist() == [0, 1, 0, 1, *[0] * 12]
    assert sample["labels"].tolist()[:4] == [6, EOD, 7, EOD]
    assert sample["tokens"].min() >= 0


def test_its_index_is_cached_beside_that_of_the_stream(tmp_path: Path) -> None:
    """Named by lengths and flags: masks, and the flags of how it is read, change nothing."""
    parts = {"blend": None, "split": None, "blend_per_split": [([str(tmp_path / "d")], None), None, None]}
    data, stream = packed(tmp_path, **parts), packed(tmp_path, **parts, sample_packing="stream")
    assert len(stream) != len(data)
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert sum("packed" in path.name for path in cached) == 2
    masks = [np.ones(len(ids)) for ids in documents()]
    for again in (
        packed(tmp_path, masks, **parts),
        packed(tmp_path, fast_cache_load=True, **parts),
        packed(tmp_path, defer_npy_index_mmap=True, **parts),
    ):
        assert len(again) == len(data) and (again[3]["tokens"] == data[3]["tokens"]).all()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == cached
    next(path for path in cached if "packed-samples" in path.name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"--data-cache-path: .*packed-samples.npy is not a whole index"):
        packed(tmp_path, **parts)
    with pytest.raises(ValueError, match=r"packed-documents.npy is missing: tools/prepare_cache.py"):
        packed(tmp_path, random_seed=2, fast_cache_load=True, **parts)


def test_a_longer_run_begins_with_the_same_samples(tmp_path: Path) -> None:
    """So that it goes on from a checkpoint of the shorter one."""
    short, long = packed(tmp_path, size=5), packed(tmp_path, size=300)
    assert len(long) >= 300 > len(short)
    for index in range(len(short)):
        assert all((long[index][name] == value).all() for name, value in short[index].items())
