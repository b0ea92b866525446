"""Bytes of text that a token stands for, counted by hand."""

import math
from argparse import Namespace

import pytest
import torch

from yoco_megatron.data import text_size

WORDS = ["", "ab", "ü", "x"]
END = 0


class Tokenizer:
    """Of WORDS, the first of which is special."""

    def detokenize(self, ids: list[int]) -> str:
        return "".join(WORDS[number] for number in ids)


@pytest.fixture(autouse=True)
def special(monkeypatch):
    monkeypatch.setattr(text_size, "special_tokens", lambda tokenizer: {END: "<end>"})


def sample(labels: list[int], mask: list[int]) -> dict[str, torch.Tensor]:
    return {"labels": torch.tensor(labels), "loss_mask": torch.tensor(mask, dtype=torch.float)}


DATA = [sample([1, 2, 3, END], [1, 1, 1, 1]), sample([1, 1, 1, 1], [0, 0, 1, 1])]


def test_labels_with_a_loss_count():
    assert text_size.bytes_per_token(DATA, Tokenizer()) == pytest.approx((2 + 2 + 1 + 0 + 2 + 2) / 6)
    assert text_size.bytes_per_token(DATA, Tokenizer(), most_tokens=4) == pytest.approx(5 / 4)
    assert text_size.bytes_per_token([sample([END], [1])], Tokenizer()) is None


def test_a_character_that_samples_divide_counts_once():
    class Bytes:
        def detokenize(self, ids: list[int]) -> str:
            return bytes(ids).decode(errors="replace")

    text = list("a日本é".encode())
    halves = [sample(text[:2], [1] * 2), sample(text[2:], [1] * (len(text) - 2))]
    assert text_size.bytes_per_token(halves, Bytes()) == 1


def test_bits_of_a_loss():
    assert text_size.bits_per_byte(math.log(4), 2.0) == pytest.approx(1.0)


def test_sets_by_their_names(monkeypatch):
    args = Namespace(mock_data=False, tokenizer_type="HuggingFaceTokenizer", validation_sets=[])
    assert text_size.of_validation(args, DATA, Tokenizer()) == {"": pytest.approx(1.5)}
    several = text_size.ValidationSets([DATA[:1], DATA[1:]], [1, 1], 1, False)
    args.validation_sets = ["code", "wiki"]
    assert text_size.of_validation(args, several, Tokenizer()) == {"-code": pytest.approx(5 / 4), "-wiki": 2.0}
    args.mock_data = True
    assert text_size.of_validation(args, DATA, Tokenizer()) == {}
