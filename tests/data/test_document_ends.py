"""What documents begin with is read from the data; another end of document than the data's is refused."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training.config import TokenizerConfig

from yoco_megatron.data.document_ends import check_document_end, document_start
from yoco_megatron.data.tokenizer import build_tokenizer

END, PAD = 0, 1


@pytest.fixture
def tokenizer(bpe_folder: Path) -> Any:
    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(bpe_folder)))


def dataset(prefix: Path, *documents: list[int]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def flags(*prefixes: str, mock: bool = False) -> Namespace:
    none = ("train_data_path", "valid_data_path", "test_data_path", "data_args_path", "per_split_data_args_path")
    more = {"split": None, "mock_data": mock, "tokenizer_model": "bpe", "eod_mask_loss": False}
    more["dataloader_inter_document_masking"] = False
    return Namespace(data_path=list(prefixes) or None, **dict.fromkeys(none) | more)


@pytest.mark.parametrize(
    ("documents", "start"),
    [
        (([PAD, 5, 6, END], [PAD, 6, END]), [PAD]),
        (([END, PAD, 5], [END, PAD, 6], [END, PAD]), [END, PAD]),
        (([5, 6, END], [5, 7, END]), []),
        (([PAD, 5], *[[PAD, 6]] * 1000, [7, 5]), []),
        (([PAD], [PAD, 3]), [PAD]),
    ],
)
def test_the_common_special_tokens_are_the_start(
    tokenizer: Any, tmp_path: Path, documents: tuple[list[int], ...], start: list[int]
) -> None:
    assert document_start(flags(dataset(tmp_path / "a", *documents)), tokenizer) == start


def test_datasets_that_differ_are_told(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = dataset(tmp_path / "one", [PAD, 5], [PAD, 6]), dataset(tmp_path / "other", [5], [6])
    caplog.set_level("WARNING")
    assert document_start(flags("0.5", one, "0.5", one), tokenizer) == [PAD] and not caplog.records
    assert document_start(flags("0.5", one, "0.5", other), tokenizer) == []
    assert f"{one} begin with the special tokens [1], those of others with []" in caplog.text


def test_without_data_nothing_is_known(tokenizer: Any) -> None:
    assert document_start(flags(mock=True), tokenizer) is None


def test_another_end_of_document_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Its tokenizer_config.json may have changed, and no hash of ids tells that."""
    prefix = dataset(tmp_path / "a", [5, END])
    check_document_end(flags(prefix), tokenizer)
    for end in (END, None):
        Path(f"{prefix}.json").write_text(json.dumps({"tokenizer": {"eod": end}}))
        check_document_end(flags(prefix), tokenizer)
    Path(f"{prefix}.json").write_text(json.dumps({"tokenizer": {"eod": 7}}))
    with pytest.raises(ValueError, match=r"--tokenizer-model bpe: .*id 0, that of .*a is 7 \(see .*a\.json\)"):
        check_document_end(flags(prefix), tokenizer)


def test_a_tokenizer_needs_an_end_of_document(tokenizer: Any) -> None:
    """Megatron's datasets ask for it, mock data too."""
    check_document_end(flags(mock=True), tokenizer)
    with pytest.raises(ValueError, match=r"--tokenizer-model bpe has no end of document \(eos_token\)"):
        check_document_end(flags(mock=True), Namespace(eod=None))


def test_a_chat_template_begins_conversations_itself(tokenizer: Any, tmp_path: Path) -> None:
    """Generation is given prompts of the template, and must not begin them again."""
    talks, texts = dataset(tmp_path / "talks", [PAD, 5, 6]), dataset(tmp_path / "texts", [END, 5])
    assert document_start(flags(talks), tokenizer) == [PAD]
    (tmp_path / "talks.json").write_text(json.dumps({"format": "messages"}))
    assert document_start(flags(talks), tokenizer) == []
    assert document_start(flags(talks, texts), tokenizer) == [END]
