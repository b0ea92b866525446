"""What is said of the data, and follows from them: samples that are read several times, masks, packed documents."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from support.cli import TINY, TINY_BASELINE
from support.datasets import write

from yoco_megatron.data.blend import DATA_FLAGS
from yoco_megatron.startup.arguments import parse
from yoco_megatron.startup.data_flags import check_enough, packing, repeated_validation

TINY_OF_DATA, TINY_BASELINE_OF_DATA = (
    [flag for flag in model if flag not in ("--mock-data", "--split", "90,5,5")] for model in (TINY, TINY_BASELINE)
)
SPLIT = ["--split", "3,2,0"]


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


@pytest.fixture
def masked(tmp_path: Path) -> str:
    return write(tmp_path / "masked", [np.arange(20)] * 50, loss_masks=[np.arange(20) > 9] * 50)


def flags_of(*flags: str) -> Namespace:
    """Of a run, with all that follows from them."""
    return parse([*TINY_OF_DATA, *flags], 1)


def test_a_mask_is_seen_and_its_documents_packed_apart(masked: str, prefix: str) -> None:
    for flags, has_masks, is_apart in (
        (["--data-path", masked, *SPLIT], True, True),
        (["--data-path", masked, *SPLIT, "--sample-packing", "stream"], True, False),
        (["--data-path", "1", prefix, "2", masked, *SPLIT], True, True),
        (["--train-data-path", prefix, "--valid-data-path", masked], True, True),
        (["--data-path", prefix, *SPLIT], False, False),
        (["--data-path", prefix, *SPLIT, "--sample-packing", "documents"], False, True),
        (["--mock-data"], False, False),
    ):
        args = flags_of(*flags)
        assert (args.has_loss_masks, args.dataloader_inter_document_masking) == (has_masks, is_apart), flags


def test_what_packing_does_is_told(masked: str, prefix: str) -> None:
    """20 of 32 tokens in each sample; 33 of 32 in those of the other."""
    said = packing(flags_of("--data-path", masked, *SPLIT))
    assert said[:2] == [
        f"{masked}, train: 30 whole documents in 30 samples an epoch, 37.50% padding",
        f"{masked}, valid: 20 whole documents in 20 samples an epoch, 37.50% padding",
    ]
    assert said[2:] == ["--dataloader-inter-document-masking is on: packed documents do not attend to each other"]
    blend = ["--data-path", "1", masked, "1", prefix, "--split", "1,0,0", "--eval-iters", "0"]
    assert len(packing(flags_of(*blend))) == 2
    said = packing(flags_of(*blend, "--sample-packing", "documents"))
    assert said[1:3] == [
        f"{prefix}, train: 100 whole documents in 100 samples an epoch, 0.00% padding",
        f"WARNING: {prefix}, train: 100 documents (100.00%) are longer than --seq-length 32: their tokens behind it, "
        "3.03% of all, are left out",
    ]
    assert packing(flags_of("--data-path", prefix, *SPLIT)) == packing(flags_of("--mock-data")) == []
    baseline = packing(parse([*TINY_BASELINE_OF_DATA, "--data-path", masked, *SPLIT], 1))
    assert baseline[-1] == "WARNING: the baseline has no document masks: packed documents see those before them"


def test_documents_that_lose_what_is_learned_of_them_are_counted(tmp_path: Path) -> None:
    """Of 40 tokens 32 stay, of which the last label is the 32nd; of the last document nothing is learned anyway."""
    masks = [np.arange(40) >= first for first in (30, 31, 32, 35, 40)]
    prefix = write(tmp_path / "long", [np.arange(40)] * 5, loss_masks=masks)
    said = packing(flags_of("--data-path", prefix, "--split", "1,0,0", "--eval-iters", "0"))
    assert said[1].endswith("20.00% of all, are left out, and with them all that is learned of 2 documents")


def test_an_evaluation_of_packed_documents_counts_their_samples(masked: str) -> None:
    """50 samples of 20 tokens in 32: more than the tokens would fill."""
    sets = {"valid_data_path": [masked], "train_data_path": [masked]}
    assert (len(said(**sets, eval_iters=10)), len(said(**sets, eval_iters=11))) == (0, 1)
    assert len(said(**sets, eval_iters=10, sample_packing="stream")) == 1


def test_a_run_that_reads_datasets_once_counts_packed_samples(masked: str, prefix: str) -> None:
    """50 samples of one, and (3300 - 1) // 32 = 103 of the other."""
    once = ["--data-path", masked, prefix, "--split", "1,0,0", "--eval-iters", "0", "--global-batch-size", "1"]
    once += ["--micro-batch-size", "1", "--train-iters"]
    check_enough(flags_of(*once, "153"))
    with pytest.raises(ValueError, match=r"they hold 153 samples, and the run needs 154"):
        check_enough(flags_of(*once, "154"))
