"""All ranks name caches after what rank 0 has read; a machine with another copy of the data is told."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from yoco_megatron.data import content, token_sample
from yoco_megatron.data.check import index_of
from yoco_megatron.data.token_sample import sample_tokens


def dataset(prefix: Path, lengths: list[int]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in lengths:
        builder.add_document(np.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_other_ranks_take_rank_0s_word_and_compare_their_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = dataset(tmp_path / "d", [3, 4])
    alone = content.index_hashes([prefix])
    assert alone == {prefix: index_of(prefix).sha256}
    rank, told = 0, []

    def broadcast(values: list[Any], src: int) -> None:
        if rank == src:
            told[:] = values
        values[:] = told

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    assert content.index_hashes([prefix]) == alone
    rank = 1
    monkeypatch.setattr(content, "index_of", None)  # only rank 0 reads all of an .idx
    assert content.index_hashes([prefix]) == alone
    dataset(tmp_path / "d", [4, 3])  # this machine has another copy
    with pytest.raises(
        ValueError, match=rf"--data-path: {prefix} is not the same on this machine as on that of rank 0"
    ):
        content.index_hashes([prefix])
    assert content.index_hashes([prefix], is_read_here=False) == alone
    mask = dataset(tmp_path / "d_loss_mask", [4, 3])  # rank 0's machine has none
    with pytest.raises(ValueError, match=rf"--data-path: {mask} is not the same on this machine"):
        content.index_hashes([prefix, mask], is_read_here=False)


def test_a_sample_sees_every_block_of_a_small_file_and_the_ends_of_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_sample, "BLOCKS", 4)
    monkeypatch.setattr(token_sample, "BLOCK_BYTES", 16)
    path, dtype = tmp_path / "d.bin", np.dtype(np.int32)
    for count, seen in ((16, range(16)), (100, [0, 3, 96, 99])):
        tokens = np.arange(1, count + 1, dtype=dtype)
        tokens.tofile(path)
        whole = sample_tokens(path, dtype)
        assert (whole.smallest, whole.largest) == (0, count)
        for place in seen:
            changed = tokens.copy()
            changed[place] = -7
            changed.tofile(path)
            found = sample_tokens(path, dtype)
            assert found.smallest == -7 and found.sha256 != whole.sha256
