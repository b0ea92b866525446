"""Irrelevant text around needles, of any length in tokens: lines of the .txt files in a folder, or a built-in noise.

    a file at random, with replacement; its lines in order, each followed by a space; the next file; and so on,
    up to the line that would pass the length

as in the authors' unilm/YOCO/yoco/criterions/needle_haystack.py. Files are sorted by name; the authors take them in the
order of the file system. Each line is encoded once, however many prompts have it.
"""

import hashlib
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from yoco_megatron.evaluation.requests import Tokenizer
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.small_files import read_text

NOISE = "noise"
NOISE_SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's
NOISE_LINES = 1000  # of the one "file"
# The authors draw from a list that has each file so many times, which decides what a random number means.
COPIES = 5000
LARGEST = 1 << 30  # bytes of a file


@dataclass(frozen=True)
class Stretch:
    """Filler of so many tokens: (file, number of its lines) one after another."""

    parts: tuple[tuple[int, int], ...]
    tokens: int


def check_filler(source: str) -> None:
    """Raises ValueError unless `source` is "noise" or a folder with .txt files."""
    if source == NOISE:
        return
    require(Path(source).is_dir(), f"'filler' {source} is no folder: name one with .txt files, or {NOISE!r}")
    require(any(Path(source).glob("*.txt")), f"'filler' {source} has no .txt file: name another folder, or {NOISE!r}")


@lru_cache(maxsize=4)
def load_filler(source: str, tokenizer: Tokenizer) -> "Filler":
    """The filler, shared by the tasks that name it. Raises ValueError as `check_filler`."""
    return Filler(source, tokenizer)


class Filler:
    """The lines of a folder's files, and how many tokens they have."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        check_filler(source)
        self.source, self.tokenizer = source, tokenizer
        self.paths = [] if source == NOISE else sorted(Path(source).glob("*.txt"))
        self.num_files = len(self.paths) or 1
        self._line_tokens = cache(lambda line: len(tokenizer.encode(line + " ")))
        self._text = cache(self._read)
        self._lines = cache(lambda file: self._text(file).splitlines())
        self._ends = cache(lambda file: list(accumulate(map(self._line_tokens, self._lines(file)))))

    def _read(self, file: int) -> str:
        if not self.paths:
            return "\n".join([NOISE_SENTENCES] * NOISE_LINES)
        return read_text(self.paths[file], LARGEST)

    def draw(self, rng: random.Random, length: int) -> Stretch:
        """Filler of at most `length` tokens, and less by less than a line. Raises ValueError if no file has text."""
        parts, tokens = [], 0
        while True:
            file = rng.choice(range(COPIES * self.num_files)) % self.num_files
            ends = self._ends(file)
            count = bisect_right(ends, length - tokens)
            if count:
                parts.append((file, count))
                tokens += ends[count - 1]
            if count < len(ends):
                return Stretch(tuple(parts), tokens)
            if not any(ends[-1:]):
                has_tokens = any(any(self._ends(each)[-1:]) for each in range(self.num_files))
                require(has_tokens, f"'filler' {self.source}: its .txt files are empty")

    def text(self, stretch: Stretch) -> str:
        """The text of a stretch: every line ends with a space."""
        return "".join(line + " " for file, count in stretch.parts for line in self._lines(file)[:count])

    def first_sentences(self, count: int) -> list[str]:
        """The first `count` sentences of all files in order, from the beginning again where they end."""
        found = self._sentences
        require(bool(found), f"'filler' {self.source}: its .txt files are empty")
        return [found[index % len(found)] for index in range(count)]

    @cached_property
    def _sentences(self) -> list[str]:
        words = " ".join(self._text(file) for file in range(self.num_files)).split()
        sentences, begin = [], 0
        for end, word in enumerate(words, 1):
            if word.rstrip("\"')]").endswith((".", "!", "?")) or end == len(words):
                sentences.append(" ".join(words[begin:end]))
                begin = end
        return sentences

    def note(self, used: Iterable[Iterable[Stretch]] = ()) -> dict[str, Any]:
        """What a result says of the filler.

        Args:
            used: the stretches of each prompt. `most_repeats` is how often one prompt has the same file.
        """
        digest = hashlib.sha256()
        for file in range(self.num_files):
            digest.update(self._text(file).encode())
        counts = (Counter(file for stretch in prompt for file, _ in stretch.parts) for prompt in used)
        return {
            "source": self.source,
            "files": self.num_files,
            "sha256": digest.hexdigest(),
            "most_repeats": max((max(count.values(), default=0) for count in counts), default=0),
        }
