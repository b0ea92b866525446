"""Phonebook prompts: the book, two solved examples, one name; and the score of the first line."""

import re

import pytest
from support.word_tokenizer import WordTokenizer

from yoco_megatron.evaluation.tasks.phonebook import MOST, Phonebook
from yoco_megatron.evaluation.tasks.words import ADJECTIVES, FIRST_NAMES, LAST_NAMES, NOUNS


def test_book_can_be_looked_up() -> None:
    tokenizer = WordTokenizer()
    task = Phonebook(entries=[5, 40], samples=3, seeds=2)
    requests = task.requests(tokenizer)
    assert len(requests) == 12
    answers = []
    for index, request in enumerate(requests):
        book, examples, asked = tokenizer.decode(request.prompt).split("\n\n")
        entries = [re.fullmatch(r"(\w+ \w+): ([6-9]\d{9})", line) for line in book.split("\n")]
        numbers = {entry[1]: entry[2] for entry in entries if entry is not None}
        assert len(numbers) == (5 if index < 6 else 40)
        shown = examples.split("\n")
        assert len(set(shown)) == 2 and set(shown) <= set(book.split("\n"))
        assert asked.endswith(":") and not any(line.startswith(asked) for line in shown)
        answers.append(numbers[asked[:-1]])
        assert request.max_new_tokens == 20 and tokenizer.decode(request.expected) == f" {answers[-1]}"
    assert len(set(answers)) == 12
    # Right with text after it, in a line of its own or not; wrong with more digits; of seed 0: 1 of 3, of seed 1: none.
    given = [f" {answers[0]}\nBob Low: 1", f" {answers[1]}7", "", "\n".join(answers), *(["no"] * 2)]
    result = task.summarise([tokenizer.encode(text) for text in given], tokenizer)
    assert result.metrics["accuracy_5"] == pytest.approx(1 / 6)
    assert result.metrics["deviation_5"] == pytest.approx(1 / 6)
    assert result.counts == {"prompts": 6}
    assert task.longest(tokenizer) == max(len(request.prompt) for request in requests) + 20


def test_lists_have_no_word_twice() -> None:
    for words in (ADJECTIVES, NOUNS, FIRST_NAMES, LAST_NAMES):
        assert len(set(words)) == len(words)
    assert len(FIRST_NAMES) * len(LAST_NAMES) == MOST > 100_000


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"entries": []}, "'entries' is empty"), ({"entries": [2]}, "'entries' has 2"), ({"seeds": 0}, "'seeds' is 0")],
)
def test_bad_settings(settings: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Phonebook(**{"entries": [4]} | settings)
