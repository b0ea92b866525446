"""An evaluation that reads samples several times is told, with both numbers."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from yoco_megatron.data.blend import DATA_FLAGS
from yoco_megatron.startup.data_flags import repeated_validation


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """100 documents of 33 tokens: of --split 9,1,0 the part valid holds (10 * 33 - 1) // 32 = 10 samples."""
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    for _ in range(100):
        builder.add_document(np.arange(33), [33])
    builder.finalize(str(tmp_path / "d.idx"))
    return str(tmp_path / "d")


def said(**flags: Any) -> list[str]:
    others = {"mock_data": False, "skip_train": False, "validates_whole": False, "validation_sets": []}
    others |= {"sample_packing": None}
    sizes = {"seq_length": 32, "global_batch_size": 5, "eval_global_batch_size": None, "eval_iters": 2}
    return repeated_validation(Namespace(**dict.fromkeys(DATA_FLAGS) | {"split": None} | others | sizes | flags))


def test_one_dataset(prefix: str) -> None:
    one = {"data_path": [prefix], "split": "9,1,0"}
    assert said(**one) == []
    (note,) = said(**one, eval_iters=3)
    assert note.startswith(f"an evaluation of --eval-iters 3 reads 15 samples of {prefix}, whose part valid holds 10: ")
    assert len(said(**one, eval_global_batch_size=6)) == 1
    assert said(**one, eval_iters=3, validates_whole=True) == said(**one, eval_iters=0) == []
    assert said(valid_data_path=[prefix], train_data_path=[prefix], eval_iters=20) == []  # all of it: 103 samples
    assert len(said(valid_data_path=[prefix], train_data_path=[prefix], eval_iters=21)) == 1


def test_blends_and_sets(prefix: str) -> None:
    blend = {"data_path": ["1", prefix, "3", prefix], "split": "9,1,0"}
    assert said(**blend) == []
    (note,) = said(**blend, eval_iters=3)  # 3.75 and 11.25 of 10
    assert "reads 12 samples" in note
    assert said(data_path=[prefix, prefix], split="9,1,0", eval_iters=4) == []
    assert len(said(data_path=[prefix, prefix], split="9,1,0", eval_iters=5)) == 1
    sets = {"valid_data_path": [prefix, prefix], "train_data_path": [prefix], "validation_sets": ["a", "b"]}
    assert (len(said(**sets, eval_iters=20)), len(said(**sets, eval_iters=21))) == (0, 2)
