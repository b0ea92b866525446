"""One needle in a haystack, the paper's Fig. 4: a city's magic number in irrelevant text, asked for at the end.

    for length in lengths: for depth in 0 ... 1: for each of the samples
        a city and a number; filler of depth x (length - 150) tokens; the needle; the rest of the filler; the question

All of it comes from one stream of random numbers, `seed`, as in the authors' needle_haystack.py (unilm/YOCO);
with their files, tokenizer and settings the prompts are theirs. The answer is right if the number is a substring of 20
greedy tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from yoco_megatron.evaluation.requests import Curve, Generate, Grid, Result, Tokenizer, mean
from yoco_megatron.evaluation.tasks.cities import CITIES
from yoco_megatron.evaluation.tasks.filler import Filler, Stretch, check_filler, load_filler
from yoco_megatron.evaluation.tasks.prompts import Lazy, to_continue
from yoco_megatron.evaluation.tasks.settings import check_counts, check_not_empty
from yoco_megatron.utils.errors import require

# It ends with two spaces, the question's and its own; `strip` removes both.
PROMPT = (
    "There is a special magic number inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the magic number there. {context} "
)
NEEDLE = "The special magic {city} number is {number} . "
QUESTION = "What is the special magic {city} number? The special magic {city} number is "
MARGIN = 150  # tokens of a prompt for all but the filler
NEW_TOKENS = 20
LARGEST_NUMBER = 50000


@dataclass(frozen=True)
class Sample:
    """A prompt before it is written: `lines` of text or filler, and the number that the question asks for."""

    length: int
    depth: float
    lines: tuple[str | Stretch, ...]
    city: str
    number: int
    same_city: int = 0  # needles of the asked city, the asked one left out

    @property
    def stretches(self) -> list[Stretch]:
        return [line for line in self.lines if isinstance(line, Stretch)]

    @property
    def tokens(self) -> int:
        """About those of the prompt: at most `length`, and less by what lines of filler do not fill."""
        return MARGIN + sum(stretch.tokens for stretch in self.stretches)


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Settings.

    lengths: in tokens. filler: folder of .txt files, or "noise". depths: from 0 to 1, evenly. samples: of each length
    and depth. strip: without the two spaces at the end, after which a number is an unlikely word.
    """

    kind: ClassVar = Generate
    name: str = "needle"
    lengths: list[int]
    filler: str
    depths: int = 11
    samples: int = 10
    seed: int = 0
    strip: bool = False

    def __post_init__(self) -> None:
        check_not_empty(self, "lengths")
        require(self.depths >= 2, f"'depths' is {self.depths}: from 0 to 1 there are at least 2")
        check_counts(self, "samples")
        short = min(self.lengths)
        require(short > MARGIN, f"'lengths' has {short}: {MARGIN} tokens are set aside for needle and question")
        check_filler(self.filler)

    def cells(self) -> list[tuple[int, float, int]]:
        """(length, depth, tokens before the needle) of each cell of the heat map."""
        last = self.depths - 1
        return [(length, k / last, (length - MARGIN) * k // last) for length in self.lengths for k in range(last + 1)]

    def sample(self, rng: random.Random, filler: Filler, length: int, depth: float, before: int) -> Sample:
        """The next sample of the random stream."""
        city, number = rng.choice(CITIES), rng.randint(1, LARGEST_NUMBER)
        prefix = filler.draw(rng, before)
        suffix = filler.draw(rng, length - MARGIN - before)
        lines = (prefix, NEEDLE.format(city=city, number=number), suffix, QUESTION.format(city=city))
        return Sample(length, depth, lines, city, number)

    def plan(self, filler: Filler) -> list[Sample]:
        """All samples, in the order of the random stream. Raises ValueError for filler that leaves prompts short."""
        rng = random.Random(self.seed)
        made = [self.sample(rng, filler, *cell) for cell in self.cells() for _ in range(self.samples)]
        for sample in made:
            require(
                2 * sample.tokens > sample.length,
                f"'filler' {self.filler}: a prompt of {sample.length:,} tokens would have {sample.tokens:,}, as lines "
                "are taken whole: break long lines of its files",
            )
        return made

    def requests(self, tokenizer: Tokenizer) -> Sequence[Generate]:
        """The prompts, each written when it is asked for."""
        filler = load_filler(self.filler, tokenizer)

        def build(sample: Sample) -> Generate:
            text = self._text([line if isinstance(line, str) else filler.text(line) for line in sample.lines])
            return to_continue(tokenizer, text, NEW_TOKENS, str(sample.number))

        return Lazy(build, self.plan(filler))

    def _text(self, lines: list[str]) -> str:
        text = PROMPT.format(context="\n".join(lines))
        return text.rstrip(" ") if self.strip else text

    def longest(self, tokenizer: Tokenizer) -> int:
        """Tokens of the longest prompt and its answer; those of the filler are counted line by line."""

        def tokens(sample: Sample) -> int:
            bare = self._text([line if isinstance(line, str) else "" for line in sample.lines])
            return sum(stretch.tokens for stretch in sample.stretches) + len(tokenizer.encode(bare))

        plan = self.plan(load_filler(self.filler, tokenizer))
        return len(tokenizer.start) + max(map(tokens, plan)) + NEW_TOKENS

    def summarise(self, answers: Sequence[list[int]], tokenizer: Tokenizer) -> Result:
        """Accuracy in all, by length, and by length and depth."""
        filler = load_filler(self.filler, tokenizer)
        plan = self.plan(filler)
        records: list[dict[str, Any]] = []
        for sample, answer in zip(plan, answers):
            text = tokenizer.decode(answer)
            records.append(
                {"length": sample.length, "depth": sample.depth, "city": sample.city, "number": sample.number}
                | {"answer": text, "right": str(sample.number) in text}
            )
        depths = tuple(dict.fromkeys(depth for _, depth, _ in self.cells()))
        lengths = tuple(dict.fromkeys(self.lengths))
        by_length = [[record for record in records if record["length"] == length] for length in lengths]
        return Result(
            metrics={"accuracy": accuracy(records)},
            chance={"accuracy": 0.0},
            counts={"prompts": len(records)},
            records=records,
            notes=self.notes(plan, filler),
            grid=Grid(
                *("depth", "length", depths, lengths),
                tuple(
                    tuple(
                        accuracy(cell) if (cell := [each for each in column if each["depth"] == depth]) else None
                        for column in by_length
                    )
                    for depth in depths
                ),
            ),
            curves=(
                Curve(
                    *("accuracy", "length", "accuracy", lengths),
                    tuple(map(accuracy, by_length)),
                    tuple(map(len, by_length)),
                ),
            ),
        )

    def notes(self, plan: list[Sample], filler: Filler) -> dict[str, Any]:
        """Where the filler is from, and how much of its length the shortest prompt has."""
        shortest = min(sample.tokens / sample.length for sample in plan)
        return {"filler": filler.note(sample.stretches for sample in plan), "shortest": round(shortest, 3)}


def accuracy(records: list[dict[str, Any]]) -> float:
    """Share of right records."""
    return mean(record["right"] for record in records)
