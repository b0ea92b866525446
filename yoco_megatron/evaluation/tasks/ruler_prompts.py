"""RULER's prompts and their answers: its templates and numbers of needles, of any size.

Keys and words come from this package's lists, and essays are cut at sentences by their punctuation.
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

from yoco_megatron.evaluation.tasks.filler import NOISE_SENTENCES, Filler
from yoco_megatron.evaluation.tasks.words import ADJECTIVES, NOUNS

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
SINGLE_WORDS = tuple(dict.fromkeys(ADJECTIVES + NOUNS))
SHORT = 4096  # below, RULER's common words are fewer
FEW_WORDS = 8192  # up to this length, cwe's words are single ones


@dataclass(frozen=True)
class Prompt:
    """A prompt and all its answers."""

    text: str
    answers: tuple[str, ...]


def word(number: int) -> str:
    """One of NUM_WORDS distinct words: an adjective and a noun."""
    return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"


def distinct(rng: random.Random, kind: str, count: int, without: Sequence[str] = ()) -> list[str]:
    """`count` distinct words, single words, numbers of 7 digits, or uuids; none of those in `without`."""
    drawn = count + len(without)
    if kind == "words":
        found = [word(number) for number in rng.sample(range(NUM_WORDS), drawn)]
    elif kind == "single words":
        found = rng.sample(SINGLE_WORDS, drawn)
    elif kind == "numbers":
        found = [str(number) for number in rng.sample(range(10**6, 10**7), drawn)]
    else:
        found = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(drawn)]
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
        return min(length, (len(SINGLE_WORDS) if length <= FEW_WORDS else NUM_WORDS) - self.COMMON)

    def write(self, rng: random.Random, size: int, length: int, filler: Filler) -> Prompt:
        """A prompt with 10 common words and `size` others."""
        kind = "single words" if length <= FEW_WORDS else "words"
        if length < SHORT:
            example, prompt = self._list(rng, kind, 10, 3, 1), self._list(rng, kind, size, 6, 1)
        else:
            example, prompt = self._list(rng, kind, 30, 10, 3), self._list(rng, kind, size, 30, 3)
        solved = " ".join(f"{number}. {each}" for number, each in enumerate(example.answers, 1))
        return Prompt(f"{example.text} {solved}\n{prompt.text}", prompt.answers)

    def _list(self, rng: random.Random, kind: str, size: int, often: int, seldom: int) -> Prompt:
        common = distinct(rng, kind, self.COMMON)
        others = distinct(rng, kind, size, without=common)
        listed = common * often + others * seldom
        rng.shuffle(listed)
        context = " ".join(f"{number}. {each}" for number, each in enumerate(listed, 1))
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
