"""Phonebook: look up one of many numbers. It tells window sizes apart (SambaY, arXiv 2507.06607).

    First Last: 6203418275      `entries` lines, a blank line, two of them again, a blank line, and
    First Last:                 of a third one

Right if the first line of the greedy continuation is its number. Names are drawn from this package's own lists, without
repeats; the original draws them with the package `names`, so numbers of entries and tokens differ a little.
"""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from yoco_megatron.evaluation.requests import Curve, Generate, Result, Tokenizer
from yoco_megatron.evaluation.tasks.needle import accuracy
from yoco_megatron.evaluation.tasks.prompts import Lazy, to_continue
from yoco_megatron.evaluation.tasks.settings import check_counts, check_not_empty
from yoco_megatron.evaluation.tasks.words import FIRST_NAMES, LAST_NAMES
from yoco_megatron.utils.errors import require

NEW_TOKENS = 20
MOST = len(FIRST_NAMES) * len(LAST_NAMES)


@dataclass(frozen=True)
class Book:
    """A prompt, and the number that it asks for."""

    entries: int
    seed: int
    text: str
    asked: str
    number: str


def write_book(entries: int, seed: int, index: int) -> Book:
    """Book `index` of a seed."""
    rng = random.Random(f"{seed} {entries} {index}")
    people = rng.sample(range(MOST), entries)
    names = [f"{FIRST_NAMES[who // len(LAST_NAMES)]} {LAST_NAMES[who % len(LAST_NAMES)]}" for who in people]
    numbers = [str(rng.randrange(6 * 10**9, 10**10)) for _ in names]
    lines = [f"{name}: {number}" for name, number in zip(names, numbers)]
    first, second, asked = rng.sample(range(entries), 3)
    text = "\n".join([*lines, "", lines[first], lines[second], "", f"{names[asked]}:"])
    return Book(entries, seed, text, names[asked], numbers[asked])


@dataclass(frozen=True, kw_only=True)
class Phonebook:
    """Settings.

    entries: numbers of lines; 480 are about 8K tokens of Llama 2, 1850 about 32K. samples: books of each number of
    lines and seed. seeds: how many, for a standard deviation.
    """

    kind: ClassVar = Generate
    name: str = "phonebook"
    entries: list[int]
    samples: int = 32
    seeds: int = 4

    def __post_init__(self) -> None:
        check_not_empty(self, "entries")
        for count in self.entries:
            require(3 <= count <= MOST, f"'entries' has {count}, and must be from 3 to {MOST:,} distinct names")
        check_counts(self, "samples", "seeds")

    def _plan(self) -> list[tuple[int, int, int]]:
        return [
            (count, seed, index)
            for count in self.entries
            for seed in range(self.seeds)
            for index in range(self.samples)
        ]

    def requests(self, tokenizer: Tokenizer) -> Sequence[Generate]:
        """The books, each written when it is asked for."""

        def build(which: tuple[int, int, int]) -> Generate:
            book = write_book(*which)
            return to_continue(tokenizer, book.text, NEW_TOKENS, f" {book.number}")

        return Lazy(build, self._plan())

    def longest(self, tokenizer: Tokenizer) -> int:
        """Tokens of the longest book and its answer."""
        return max(len(request.prompt) for request in self.requests(tokenizer)) + NEW_TOKENS

    def summarise(self, answers: Sequence[list[int]], tokenizer: Tokenizer) -> Result:
        """Accuracy, by number of lines too, and its standard deviation over seeds."""
        records: list[dict[str, Any]] = []
        for which, answer in zip(self._plan(), answers):
            book = write_book(*which)
            text = tokenizer.decode(answer)
            lines = text.strip().splitlines()
            records.append(
                {"entries": book.entries, "seed": book.seed, "name": book.asked, "number": book.number}
                | {"answer": text, "right": bool(lines) and lines[0].strip() == book.number}
            )
        metrics = {"accuracy": accuracy(records)}
        entries = tuple(dict.fromkeys(self.entries))
        by_entries = [[record for record in records if record["entries"] == count] for count in entries]
        for count, own in zip(entries, by_entries):
            seeds = [[record for record in own if record["seed"] == seed] for seed in range(self.seeds)]
            metrics[f"accuracy_{count}"] = accuracy(own)
            metrics[f"deviation_{count}"] = statistics.pstdev(map(accuracy, filter(None, seeds))) if own else math.nan
        return Result(
            metrics=metrics,
            chance={key: 0.0 for key in metrics if key.startswith("accuracy")},
            counts={"prompts": len(records)},
            records=records,
            notes={"names": "lists of this package, without repeats"},
            curves=(
                Curve(
                    *("accuracy", "entries", "accuracy", entries),
                    tuple(map(accuracy, by_entries)),
                    tuple(map(len, by_entries)),
                ),
            ),
        )
