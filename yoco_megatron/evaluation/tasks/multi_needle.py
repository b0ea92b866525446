"""Several needles, the paper's Table 4: the numbers of N cities in the text, one of which is asked for.

    1 to N - 1 needles in the first depth x (length - 150) tokens, the others in the rest, all at random places but the
    last of the first group: it stands at `depth`, and is asked for

As in the authors' criterions/multi_needle.py (unilm/YOCO), from one stream of random numbers. Cities are drawn from a
list that has some twice: then two needles of one city can have different numbers, and no model can be always right. The
notes have the share of such prompts; `distinct_cities` avoids them.
"""

import itertools
import random
from dataclasses import dataclass
from typing import Any

from yoco_megatron.evaluation.tasks.cities import CITIES
from yoco_megatron.evaluation.tasks.filler import Filler, Stretch
from yoco_megatron.evaluation.tasks.needle import LARGEST_NUMBER, MARGIN, QUESTION, Needle, Sample
from yoco_megatron.utils.errors import require

NEEDLE = "The special magic {city} number is: {number}"


def random_partition(rng: random.Random, total: int, parts: int) -> list[int]:
    """`parts` positive integers of sum `total`."""
    cuts = [0, *sorted(rng.sample(range(1, total), parts - 1)), total]
    return [end - begin for begin, end in itertools.pairwise(cuts)]


@dataclass(frozen=True, kw_only=True)
class MultiNeedle(Needle):
    """Settings: those of Needle, and `needles`, of which one is asked for. depths: evenly, without 0 and 1."""

    name: str = "multi_needle"
    needles: int = 4
    depths: int = 10
    samples: int = 5
    seed: int = 42
    distinct_cities: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        most = len(self._cities())
        require(1 <= self.needles <= most, f"'needles' is {self.needles}, and must be from 1 to {most}")
        for length, _, before in self.cells():
            room = min(before, length - MARGIN - before)
            require(room > self.needles, f"'lengths' has {length}, too few tokens for {self.needles} 'needles'")

    def _cities(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(CITIES)) if self.distinct_cities else CITIES

    def cells(self) -> list[tuple[int, float, int]]:
        """(length, depth, tokens before the needle) of each cell of the heat map."""
        parts = self.depths + 1
        return [(length, k / parts, (length - MARGIN) * k // parts) for length in self.lengths for k in range(1, parts)]

    def sample(self, rng: random.Random, filler: Filler, length: int, depth: float, before: int) -> Sample:
        """The next sample of the random stream."""
        after = length - MARGIN - before
        first, final = [before], after
        second: list[int] = []
        if self.needles > 1:
            num_first = rng.randint(1, self.needles - 1)
            first = random_partition(rng, before, num_first)
            *second, final = random_partition(rng, after, self.needles + 1 - num_first)
        cities = rng.sample(self._cities(), self.needles)[::-1]
        lines: list[str | Stretch] = []
        numbers = []
        for city, tokens in zip(cities, first + second):
            lines.append(filler.draw(rng, tokens))
            numbers.append(rng.randint(1, LARGEST_NUMBER))
            lines.append(NEEDLE.format(city=city, number=numbers[-1]))
        lines.append(filler.draw(rng, final))
        asked = len(first) - 1
        lines.append(QUESTION.format(city=cities[asked]))
        same = cities.count(cities[asked]) - 1
        return Sample(length, depth, tuple(lines), cities[asked], numbers[asked], same)

    def notes(self, plan: list[Sample], filler: Filler) -> dict[str, Any]:
        """Where the filler is from; the share of prompts that have the asked city twice."""
        share = sum(sample.same_city > 0 for sample in plan) / len(plan)
        return super().notes(plan, filler) | {"needles": self.needles, "ambiguous_prompts": share}
