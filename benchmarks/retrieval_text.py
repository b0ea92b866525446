"""Documents that ask for what stood in them before: facts between pieces of real text, and questions with answers.

    text  The special magic Oslo number is 4711 .  text  Anna Berg: 7365019284  text
    What is the special magic Oslo number? The special magic Oslo number is 4711 .  text  Anna Berg: 7365019284

Facts are numbers of cities, as in the needle task, and of people, as in Phonebook. Each question is of a fact drawn
from all that the document has told so far, so that distances are spread up to its length.
"""

import random
from collections.abc import Iterator

from yoco_megatron.evaluation.tasks.cities import CITIES
from yoco_megatron.evaluation.tasks.words import FIRST_NAMES, LAST_NAMES

PIECE = 400  # characters of text between two facts or questions


def document(rng: random.Random, filler: Iterator[str], characters: int) -> str:
    """A document of about so many characters; `filler` gives pieces of text."""
    cities = list(dict.fromkeys(CITIES))
    rng.shuffle(cities)
    told: list[tuple[str, str]] = []  # what a question says, and its answer
    parts: list[str] = []
    size = 0
    while size < characters:
        kind = rng.random()
        if told and (kind < 0.5 or not cities):
            part = "".join(rng.choice(told))
        elif kind < 0.75 and cities:
            city, number = cities.pop(), rng.randint(1, 50000)
            part = f"The special magic {city} number is {number} . "
            # The question ends in two spaces, as the prompts of the task do.
            told.append(
                (f"What is the special magic {city} number? The special magic {city} number is  ", f"{number} . ")
            )
        else:
            name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
            told.append((f"{name}:", f" {rng.randrange(6 * 10**9, 10**10)}"))
            part = "".join(told[-1])
        parts += [next(filler), part]
        size += len(parts[-1]) + len(parts[-2])
    return "\n".join(parts)


def pieces(texts: list[str], rng: random.Random) -> Iterator[str]:
    """Endless pieces of PIECE characters, each of a text drawn anew."""
    while True:
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - PIECE))
        yield text[start : start + PIECE]


def documents(texts: list[str], characters: int, total: int, seed: int) -> Iterator[str]:
    """Documents of `characters` each until there are `total`."""
    rng = random.Random(seed)
    filler = pieces(texts, rng)
    for _ in range(max(1, total // characters)):
        yield document(rng, filler, characters)
