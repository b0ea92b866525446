"""Losses by position and by context, and bits per byte: which token is asked with what before it, and sums by hand."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from support.word_tokenizer import WordTokenizer

from yoco_megatron.evaluation.tasks.documents import iter_documents
from yoco_megatron.evaluation.tasks.loss_by_context import LossByContext
from yoco_megatron.evaluation.tasks.loss_by_position import LossByPosition
from yoco_megatron.evaluation.tasks.validation_loss import ValidationLoss

TEXTS = [" ".join(f"ö{number}" for number in range(size)) for size in (1, 5, 20, 33)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "all.jsonl").write_text("\n\n".join(json.dumps({"text": text, "id": 1}) for text in TEXTS))
    return tmp_path


def write_dataset(folder: Path, tokenizer: WordTokenizer) -> str:
    prefix = f"{folder}/stored"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for text in TEXTS:
        tokens = [*tokenizer.start, *tokenizer.encode(text), tokenizer.end]
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("start", [(0,), ()])
def test_all_kinds_of_data_are_the_same_documents(folder: Path, start: tuple[int, ...]) -> None:
    tokenizer = WordTokenizer(start)
    expected = [[*start, *tokenizer.encode(text)] for text in TEXTS]
    # Without <s>, nothing is predicted of the first text, nor the first word of the others.
    skipped = 0 if start else 1
    num_bytes = [
        len((" ".join(["", *text.split()[skipped:]]) if skipped else text).encode()) for text in TEXTS[skipped:]
    ]
    for data in (str(folder), f"{folder}/all.jsonl", write_dataset(folder, tokenizer)):
        documents = list(iter_documents(data, tokenizer, "text"))
        assert [document.tokens.tolist() for document in documents] == expected[skipped:]
        assert [document.predicted_bytes(tokenizer) for document in documents] == num_bytes


def test_bins_by_hand(folder: Path) -> None:
    tokenizer = WordTokenizer()
    task = LossByPosition(data=str(folder), length=8, limit=3)
    requests = task.requests(tokenizer)
    assert [(len(request.tokens), request.first) for request in requests] == [(2, 1), (6, 1), (8, 1)]
    assert task.longest(tokenizer) == 8
    # The loss of a token is its position, from 1 on, plus 10 a document.
    answers = [np.arange(1, len(request.tokens)) + 10 * index for index, request in enumerate(requests)]
    result = task.summarise(answers, tokenizer)
    by_bin, cumulative = result.curves
    assert by_bin.x == cumulative.x == (1, 2, 4)  # positions 1, 2 to 3, 4 to 7
    assert by_bin.counts == (3, 4, 6) and cumulative.counts == (3, 7, 13)
    bins = [[1, 11, 21], [12, 13, 22, 23], [14, 15, 24, 25, 26, 27]]
    assert by_bin.y == pytest.approx([np.mean(each) for each in bins])
    assert cumulative.y == pytest.approx([np.mean(np.concatenate(bins[:end])) for end in (1, 2, 3)])
    assert result.metrics == pytest.approx({"loss": np.mean(np.concatenate(bins)), "loss_last_bin": np.mean(bins[2])})
    assert result.counts == {"documents": 3, "tokens": 13}
    assert task.summarise([], tokenizer).curves[0].x == ()


def test_same_last_tokens_with_more_before_them(folder: Path) -> None:
    tokenizer = WordTokenizer()
    task = LossByContext(data=str(folder), contexts=[2, 12], last=4)
    requests = task.requests(tokenizer)
    assert task.longest(tokenizer) == 16 and len(requests) == 4  # documents 2 and 3
    for short, long in zip(requests[::2], requests[1::2]):
        assert (len(short.tokens), short.first, len(long.tokens), long.first) == (6, 2, 16, 12)
        assert short.tokens.tolist() == long.tokens[-6:].tolist()
    assert requests[1].tokens.tolist() == [0, *tokenizer.encode(TEXTS[2])][:16]
    result = task.summarise([[1, 1, 1, 1], [0, 0, 0, 2], [3, 3, 3, 3], [1, 1, 1, 1]], tokenizer)
    assert result.metrics == {"loss_2": 2, "loss_12": 0.75}
    assert result.curves[0].counts == (8, 8) and result.counts == {"documents": 2, "tokens": 8}
    assert task.summarise([[5, 5, 5, 5], [1, 1, 1, 1], [9, 9, 9, 9]], tokenizer).metrics == {"loss_2": 5, "loss_12": 1}
    assert all(map(math.isnan, task.summarise([[5, 5, 5, 5]], tokenizer).metrics.values()))
    with pytest.raises(ValueError, match=r"no document .* has the 44 tokens"):
        LossByContext(data=str(folder), contexts=[40], last=4).requests(tokenizer)


def test_windows_predict_every_token_once(folder: Path) -> None:
    rng = random.Random(0)
    tokenizer = WordTokenizer()
    (document,) = (each for each in iter_documents(f"{folder}/3.txt", tokenizer, "text"))
    size = len(document.tokens)
    for _ in range(50):
        length = rng.randrange(2, size + 3)
        stride = rng.randrange(1, length)
        task = ValidationLoss(data=f"{folder}/3.txt", length=length, stride=stride)
        predicted: list[int] = []
        for request in task.requests(tokenizer):
            assert len(request.tokens) <= length and request.first >= 1
            at = document.tokens.tolist().index(request.tokens[0])
            assert request.tokens.tolist() == document.tokens[at : at + len(request.tokens)].tolist()
            new = range(at + request.first, at + len(request.tokens))
            assert at == 0 or request.first >= length - stride
            predicted += new
        assert predicted == list(range(1, size))


def test_bits_per_byte_by_hand(folder: Path) -> None:
    tokenizer = WordTokenizer()
    task = ValidationLoss(data=f"{folder}/all.jsonl", length=10)
    answers = [np.full(len(request.tokens) - request.first, 0.5, np.float32) for request in task.requests(tokenizer)]
    result = task.summarise(answers, tokenizer)
    tokens, num_bytes = 1 + 5 + 20 + 33, sum(len(text.encode()) for text in TEXTS)
    assert result.counts == {"documents": 4, "tokens": tokens, "bytes": num_bytes}
    assert result.metrics == pytest.approx(
        {"loss": 0.5, "perplexity": math.exp(0.5), "bits_per_byte": tokens * 0.5 / math.log(2) / num_bytes}
    )
    # The last document has several windows, and is left out where one has no answer.
    assert task.summarise(answers[:-1], tokenizer).counts["documents"] == 3
    none = task.summarise([], tokenizer)
    assert none.counts["documents"] == 0 and all(map(math.isnan, none.metrics.values()))


def test_no_whole_document_has_no_loss(folder: Path) -> None:
    for task in (
        LossByContext(data=str(folder), contexts=[4, 8], last=3),
        ValidationLoss(data=str(folder), length=8),
    ):
        metrics = task.summarise([], WordTokenizer()).metrics
        assert metrics and all(map(math.isnan, metrics.values()))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a b"}\n{"text": 1}', ["a.jsonl:2", "'text'", "not text"]),
        ("a.jsonl", '{"text": "a b"', ["a.jsonl:1", "not a line of JSON"]),
        ("a.jsonl", "", ["holds no document"]),
        ("a.txt", "", ["holds no document"]),
    ],
)
def test_bad_text(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        LossByPosition(data=f"{tmp_path}/{name}", length=8).requests(WordTokenizer(()))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (LossByPosition, {"data": "nowhere"}, ["'data' nowhere", ".idx"]),
        (LossByPosition, {"length": 1}, ["'length' is 1"]),
        (LossByPosition, {"limit": 0}, ["'limit' is 0"]),
        (ValidationLoss, {"stride": 8}, ["'stride' is 8", "7"]),
        (ValidationLoss, {"stride": 0}, ["'stride' is 0"]),
        (LossByContext, {"contexts": []}, ["'contexts' is empty"]),
        (LossByContext, {"last": 0}, ["'last' is 0"]),
    ],
)
def test_bad_settings(make: type, settings: dict, words: list[str], folder: Path) -> None:
    usual = {"data": str(folder)} | ({"contexts": [4]} if make is LossByContext else {"length": 8})
    with pytest.raises(ValueError) as error:
        make(**usual | settings)
    assert all(word in str(error.value) for word in words)


def test_truncated_dataset(folder: Path) -> None:
    prefix = write_dataset(folder, WordTokenizer())
    Path(f"{prefix}.bin").write_bytes(b"\0" * 8)
    with pytest.raises(ValueError, match=r"stored\.bin is shorter than its \.idx says"):
        ValidationLoss(data=prefix, length=8)
    with pytest.raises(ValueError, match="prefix of a"):
        ValidationLoss(data=f"{prefix}.bin", length=8)


def test_dataset_of_another_tokenizer(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = WordTokenizer()
    data = write_dataset(folder, tokenizer)
    Path(f"{data}.json").write_text(json.dumps({"tokenizer": {"sha256": "theirs"}}))
    tokenizer.sha256 = "ours"
    assert list(iter_documents(data, tokenizer, "text")) and "another tokenizer than the model has" in caplog.text
    tokenizer.rows = len(tokenizer.words) - 1
    with pytest.raises(ValueError, match=r"stored, document 3: ids from 0 to \d+ are not the tokenizer's"):
        list(iter_documents(data, tokenizer, "text"))
