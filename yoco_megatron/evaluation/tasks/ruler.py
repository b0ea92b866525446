"""RULER (arXiv 2404.06654, github.com/NVIDIA/RULER): retrieval, tracing and counting at any length.

Each prompt has its own stream of random numbers: prompts are of RULER's distribution and not its own ones. The score is
the share of a prompt's answers that the greedy continuation contains, ignoring case. RULER's question answering tasks
need data sets and are left out.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from yoco_megatron.evaluation.requests import Curve, Generate, Result, Tokenizer, mean
from yoco_megatron.evaluation.tasks.filler import NOISE, check_filler, load_filler
from yoco_megatron.evaluation.tasks.prompts import Lazy, to_continue
from yoco_megatron.evaluation.tasks.ruler_prompts import ESSAY_SUBTASKS, SUBTASKS, Prompt
from yoco_megatron.evaluation.tasks.settings import check_counts, check_not_empty
from yoco_megatron.utils.errors import nearest, require


@dataclass(frozen=True)
class Which:
    """One prompt of the task."""

    subtask: str
    length: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """Settings.

    lengths: in tokens, prompt and answer together. subtasks: those that need no essays by default. samples: of each
    subtask and length; 500 in the paper. filler: folder of .txt files, for the subtasks with essays.
    """

    kind: ClassVar = Generate
    name: str = "ruler"
    lengths: list[int]
    subtasks: list[str] | None = None
    samples: int = 500
    seed: int = 42
    filler: str | None = None

    def __post_init__(self) -> None:
        check_not_empty(self, "lengths")
        require(min(self.lengths) >= 1, "'lengths' must be positive")
        check_counts(self, "samples")
        require(bool(self._names()), "'subtasks' is empty")
        for name in self._names():
            require(name in SUBTASKS, f"'subtasks' has {name!r}{nearest(name, SUBTASKS)}")
            needs = name in ESSAY_SUBTASKS and self.filler in (None, NOISE)
            require(not needs, f"{name} needs 'filler': a folder of .txt files with essays or books")
        if self.filler is not None:
            check_filler(self.filler)

    def _names(self) -> list[str]:
        if self.subtasks is None:
            return [name for name in SUBTASKS if name not in ESSAY_SUBTASKS]
        return list(dict.fromkeys(self.subtasks))

    def _plan(self) -> list[Which]:
        return [
            Which(subtask, length, index)
            for subtask in self._names()
            for length in self.lengths
            for index in range(self.samples)
        ]

    def prompt(self, which: Which, size: int, tokenizer: Tokenizer) -> Prompt:
        """A prompt of that size. Its answers do not depend on the size."""
        stream = random.Random(f"{self.seed} {which.subtask} {which.length} {which.index}")
        return SUBTASKS[which.subtask].write(stream, size, which.length, load_filler(self.filler or NOISE, tokenizer))

    def request(self, which: Which, size: int, tokenizer: Tokenizer) -> Generate:
        """A request of that size, which may be too long."""
        prompt = self.prompt(which, size, tokenizer)
        new_tokens = SUBTASKS[which.subtask].new_tokens
        return to_continue(tokenizer, prompt.text, new_tokens, f" {', '.join(prompt.answers)}")

    def largest_size(self, subtask: str, length: int, tokenizer: Tokenizer) -> int:
        """A size with which prompts have about `length` tokens: extrapolated from one with an eighth of them.

        Raises:
            ValueError: not even the smallest prompt fits.
        """

        def tokens(size: int) -> int:
            return _tokens(self.request(Which(subtask, length, 0), size, tokenizer))

        most = SUBTASKS[subtask].most(length)
        size, smallest = 1, tokens(1)
        _require_room(smallest <= length, subtask, length)
        while (now := tokens(size)) < length / 8 or now == smallest:
            if size >= most:
                return most
            size = min(2 * size, most)
        return min(most, 1 + (length - smallest) * (size - 1) // (now - smallest))

    def requests(self, tokenizer: Tokenizer) -> Sequence[Generate]:
        """The prompts, each written when it is asked for, and as long as fits."""
        sizes = {
            (subtask, length): self.largest_size(subtask, length, tokenizer)
            for subtask in self._names()
            for length in self.lengths
        }

        def build(which: Which) -> Generate:
            size = sizes[which.subtask, which.length]
            while _tokens(request := self.request(which, size, tokenizer)) > which.length:
                require(
                    size > 1, f"'lengths' has {which.length}, too few tokens for {which.subtask}: leave one of them out"
                )
                size -= max(1, size // 64)
            return request

        return Lazy(build, self._plan())

    def longest(self, tokenizer: Tokenizer) -> int:
        """The largest of the lengths. Raises ValueError for one that is too short for a subtask."""
        for subtask, length in itertools.product(self._names(), self.lengths):
            smallest = (_tokens(self.request(Which(subtask, length, k), 1, tokenizer)) for k in range(self.samples))
            # They differ little: only where the first nearly fills the length another may not fit.
            fits = 4 * (first := next(smallest)) < 3 * length or max([first, *smallest]) <= length
            _require_room(fits, subtask, length)
        return max(self.lengths)

    def summarise(self, answers: Sequence[list[int]], tokenizer: Tokenizer) -> Result:
        """The average score, that of each subtask, and of each subtask by length."""
        records: list[dict[str, Any]] = []
        for which, answer in zip(self._plan(), answers):
            expected = self.prompt(which, 1, tokenizer).answers
            text = tokenizer.decode(answer)
            found = sum(each.lower() in text.lower() for each in expected) / len(expected)
            records.append(
                {"subtask": which.subtask, "length": which.length, "expected": list(expected)}
                | {"answer": text, "score": found, "right": found == 1}
            )
        by_subtask = {name: [each for each in records if each["subtask"] == name] for name in self._names()}
        scores = {name: _score(own) for name, own in by_subtask.items() if own}
        lengths = tuple(dict.fromkeys(self.lengths))
        curves = []
        for name, own in by_subtask.items():
            cells = [[each for each in own if each["length"] == length] for length in lengths]
            curves.append(Curve(name, "length", "score", lengths, tuple(map(_score, cells)), tuple(map(len, cells))))
        notes: dict[str, Any] = {"words": "lists of this package"}
        if self.filler is not None:
            notes["filler"] = load_filler(self.filler, tokenizer).note()
        return Result(
            metrics={"average": mean(scores.values())} | scores,
            chance={"average": 0.0} | dict.fromkeys(scores, 0.0),
            counts={"prompts": len(records)},
            records=records,
            notes=notes,
            curves=tuple(curves),
        )


def _tokens(request: Generate) -> int:
    return len(request.prompt) + request.max_new_tokens


def _require_room(fits: bool, subtask: str, length: int) -> None:
    require(fits, f"'lengths' has {length}, too few tokens for {subtask}: leave one of them out")


def _score(records: list[dict[str, Any]]) -> float:
    return mean(record["score"] for record in records)
