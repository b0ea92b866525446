"""RULER (arXiv 2404.06654, github.com/NVIDIA/RULER): retrieval, tracing and counting at any length.

Its templates, numbers of needles, answers and scores. Each prompt has its own stream of random numbers: they are
of RULER's distribution and not its very prompts; keys and words come from this package's lists, and essays are cut at
sentences by their punctuation. The score of a prompt is the share of its answers that the greedy continuation contains,
ignoring case. RULER's question answering tasks need data sets and are left out.
"""

import itertools
import math
import random
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from yoco_megatron.evaluation.requests import Curve, Generate, Result, Tokenizer
from yoco_megatron.evaluation.tasks.filler import NOISE, NOISE_SENTENCES, Filler, check_filler, load_filler
from yoco_megatron.evaluation.tasks.prompts import Lazy, to_continue
from yoco_megatron.evaluation.tasks.words import ADJECTIVES, NOUNS
from yoco_megatron.utils.errors import nearest, require

NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text? The special magic {kind} for {query} mentioned in the provided text are"
)
NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
NUM_WORDS = len(ADJECTIVES) * len(NOUNS)
DEPTHS = [round(100 * place / 39) for place in range(40)]  # of needles in essays, in percent
SHORT = 4096  # below, RULER's common words are fewer


@dataclass(frozen=True)
class Prompt:
    """A prompt and all its answers."""

    text: str
    answers: tuple[str, ...]


def word(number: int) -> str:
    """One of NUM_WORDS distinct words: an adjective and a noun."""
    return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"


def distinct(rng: random.Random, kind: str, count: int, without: Sequence[str] = ()) -> list[str]:
    """`count` distinct words, numbers of 7 digits, or uuids; none of those in `without`."""
    drawn = count + len(without)
    if kind == "words":
        found = (word(number) for number in rng.sample(range(NUM_WORDS), drawn))
    elif kind == "numbers":
        found = (str(number) for number in rng.sample(range(10**6, 10**7), drawn))
    else:
        found = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(drawn))
    return [each for each in found if each not in without][:count]


def insert(lines: list[str], places: list[int], added: list[str]) -> list[str]:
    """`added` in their order, before the lines whose sorted indices are `places`."""
    for place, line in zip(sorted(places, reverse=True), reversed(added)):
        lines.insert(place, line)
    return lines


@dataclass(frozen=True)
class Niah:
    """Needles in a haystack: keys with values, of which some keys are asked for.

    haystack: "noise", "essay", or "needles", which are others with the same kinds of key and value.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1
    new_tokens: ClassVar[int] = 128

    def most(self, length: int) -> int:
        """Sentences of the longest haystack."""
        return length if self.haystack != "needles" else min(length, NUM_WORDS - self.num_keys)

    def write(self, rng: random.Random, size: int, length: int, filler: Filler) -> Prompt:
        """A prompt with `size` sentences of hay."""
        keys = distinct(rng, self.keys, self.num_keys)
        values = {key: distinct(rng, self.values, self.num_values) for key in keys}
        asked = rng.sample(keys, self.num_asked)
        needle = partial(NEEDLE.format, kind=self.values)
        needles = [needle(key=key, value=value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        if self.haystack == "essay":
            hay = filler.first_sentences(size)
            places = [int(size * depth / 100) for depth in rng.sample(DEPTHS, len(needles))]
        else:
            hay = [NOISE_SENTENCES] * size
            if self.haystack == "needles":
                others = distinct(rng, self.keys, size, without=keys)
                hay = [needle(key=key, value=value) for key, value in zip(others, distinct(rng, self.values, size))]
            places = rng.sample(range(max(size, len(needles))), len(needles))
        context = (" " if self.haystack == "essay" else "\n").join(insert(hay, places, needles))
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        answers = tuple(value for key in asked for value in values[key])
        if len(answers) == 1:
            return Prompt(NIAH_ONE.format(kind=self.values[:-1], context=context, query=query), answers)
        return Prompt(NIAH.format(kind=self.values, context=context, query=query), answers)


class VariableTracking:
    """vt: a chain of assignments in noise, after a solved example of shorter names."""

    HOPS = 4
    EXAMPLE_SIZE = 10
    new_tokens = 30

    def most(self, length: int) -> int:
        """Sentences of the longest haystack."""
        return length

    def write(self, rng: random.Random, size: int, length: int, filler: Filler) -> Prompt:
        """A prompt with `size` sentences of noise."""
        example = self._chain(rng, self.EXAMPLE_SIZE, letters=3)
        prompt = self._chain(rng, size, letters=5)
        return Prompt(f"{example.text}{' '.join(example.answers)}\n\n{prompt.text}", prompt.answers)

    def _chain(self, rng: random.Random, size: int, letters: int) -> Prompt:
        names: list[str] = []
        while len(names) <= self.HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] * (name not in names)
        value = rng.randrange(10000, 99999)
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
        lines = [NOISE_SENTENCES] * size
        places = rng.sample(range(max(size, len(chain))), len(chain))
        context = "\n".join(insert(lines, places, chain))
        return Prompt(TRACKING.format(context=context, query=value, count=len(names)), tuple(names))


class CommonWords:
    """cwe: 10 words appear 30 times each, the others 3 times, in a shuffled numbered list; after a solved example."""

    COMMON = 10
    new_tokens = 120

    def most(self, length: int) -> int:
        """Distinct words of the longest list."""
        return min(length, NUM_WORDS - self.COMMON)

    def write(self, rng: random.Random, size: int, length: int, filler: Filler) -> Prompt:
        """A prompt with 10 common words and `size` others."""
        if length < SHORT:
            example, prompt = self._list(rng, 10, 3, 1), self._list(rng, size, 6, 1)
        else:
            example, prompt = self._list(rng, 30, 10, 3), self._list(rng, size, 30, 3)
        solved = " ".join(f"{number}. {word}" for number, word in enumerate(example.answers, 1))
        return Prompt(f"{example.text} {solved}\n{prompt.text}", prompt.answers)

    def _list(self, rng: random.Random, size: int, often: int, seldom: int) -> Prompt:
        common = distinct(rng, "words", self.COMMON)
        others = distinct(rng, "words", size, without=common)
        listed = common * often + others * seldom
        rng.shuffle(listed)
        context = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
        return Prompt(COMMON.format(context=context), tuple(common))


class FrequentWords:
    """fwe: made-up words, the k-th of which appears in proportion to k^-2; the first is "...", the next three asked."""

    ALPHA = 2.0
    ZETA = math.pi**2 / 6  # of ALPHA
    new_tokens = 50

    def most(self, length: int) -> int:
        """Words of the longest text."""
        return length

    def write(self, rng: random.Random, size: int, length: int, filler: Filler) -> Prompt:
        """A prompt with about `size` words."""
        names = {"...": None}
        while len(names) < max(length // 50, 4):
            names["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        words = list(names)
        # 40 is where three different counts first exist.
        counts = [int(max(size, 40) * rank**-self.ALPHA / self.ZETA) for rank in range(1, len(words) + 1)]
        text = [each for each, count in zip(words, counts) for _ in range(count)]
        rng.shuffle(text)
        return Prompt(FREQUENT.format(context=" ".join(text)), tuple(words[1:4]))


SUBTASKS: dict[str, Any] = {
    "niah_single_1": Niah("noise"),
    "niah_single_2": Niah("essay"),
    "niah_single_3": Niah("essay", values="uuids"),
    "niah_multikey_1": Niah("essay", num_keys=4),
    "niah_multikey_2": Niah("needles"),
    "niah_multikey_3": Niah("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Niah("essay", num_values=4),
    "niah_multiquery": Niah("essay", num_keys=4, num_asked=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
}
ESSAY_SUBTASKS = frozenset(name for name, made in SUBTASKS.items() if getattr(made, "haystack", None) == "essay")


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
        require(bool(self.lengths), "'lengths' is empty")
        require(min(self.lengths) >= 1, "'lengths' must be positive")
        require(self.samples >= 1, f"'samples' is {self.samples}, and must be at least 1")
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
        require(smallest <= length, f"'lengths' has {length}, too few tokens for {subtask}")
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
                require(size > 1, f"'lengths' has {which.length}, too few tokens for {which.subtask}")
                size -= max(1, size // 64)
            return request

        return Lazy(build, self._plan())

    def longest(self, tokenizer: Tokenizer) -> int:
        """The largest of the lengths. Raises ValueError for one that is too short for a subtask."""
        for subtask in self._names():
            shortest = Which(subtask, min(self.lengths), 0)
            fits = _tokens(self.request(shortest, 1, tokenizer)) <= shortest.length
            require(fits, f"'lengths' has {shortest.length}, too few tokens for {subtask}")
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
            metrics={"average": sum(scores.values()) / max(len(scores), 1)} | scores,
            chance={"average": 0.0} | dict.fromkeys(scores, 0.0),
            counts={"prompts": len(records)},
            records=records,
            notes=notes,
            curves=tuple(curves),
        )


def _tokens(request: Generate) -> int:
    return len(request.prompt) + request.max_new_tokens


def _score(records: list[dict[str, Any]]) -> float:
    return sum(record["score"] for record in records) / max(len(records), 1)
