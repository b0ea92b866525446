"""Needle prompts: equal to those that the protocol gives by hand, and in the order of one stream of random numbers.

The protocol is that of the authors' needle_haystack.py and multi_needle.py (unilm/YOCO); the oracle below goes line by
line and prompt by prompt, with Python's global stream.
"""

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from support.word_tokenizer import WordTokenizer

from yoco_megatron.evaluation.tasks.cities import CITIES
from yoco_megatron.evaluation.tasks.filler import load_filler
from yoco_megatron.evaluation.tasks.multi_needle import MultiNeedle
from yoco_megatron.evaluation.tasks.needle import Needle

FILES = {"b.txt": "one two three\n\nfour\n", "a.txt": "five six\nseven eight nine ten\n", "c.txt": "", "d.md": "no"}
HEAD = (
    "There is a special magic number inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the magic number there. "
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def texts(task: Needle, tokenizer: WordTokenizer) -> list[str]:
    requests = task.requests(tokenizer)
    assert all(request.prompt[0] == 0 and request.max_new_tokens == 20 for request in requests)
    assert all((request.stop, request.banned) == ({1}, {0}) for request in requests)
    return [tokenizer.decode(request.prompt) for request in requests]


def naive_filler(tokenizer: WordTokenizer, length: int) -> str:
    text, used = "", 0
    copies = ["a.txt", "b.txt", "c.txt"] * 5000
    while True:
        for line in FILES[random.choice(copies)].splitlines():
            count = len(tokenizer.encode(line + " "))
            if used + count > length:
                return text
            text, used = text + line + " ", used + count


def naive_needle(tokenizer: WordTokenizer, lengths: list[int], samples: int) -> list[str]:
    random.seed(0)
    found = []
    for length in lengths:
        for k in range(11):
            for _ in range(samples):
                before = int((length - 150) * k / 10)
                city = random.choice(CITIES)
                number = random.randint(1, 50000)
                prefix = naive_filler(tokenizer, before)
                suffix = naive_filler(tokenizer, length - 150 - before)
                needle = f"The special magic {city} number is {number} . "
                question = f"What is the special magic {city} number? The special magic {city} number is "
                found.append(f"{HEAD}{prefix}\n{needle}\n{suffix}\n{question} ")
    return found


def naive_multi_needle(tokenizer: WordTokenizer, length: int, needles: int) -> list[str]:
    def partition(total: int, parts: int) -> list[int]:
        cuts = [0, *sorted(random.sample(range(1, total), parts - 1)), total]
        return [cuts[at + 1] - cuts[at] for at in range(parts)]

    random.seed(42)
    found = []
    for k in range(1, 11):
        for _ in range(5):
            before = int((length - 150) * k / 11)
            after = length - 150 - before
            if needles > 1:
                num_first = random.randint(1, needles - 1)
                first, second = partition(before, num_first), partition(after, needles + 1 - num_first)
                last = second.pop()
            else:
                first, second, last = [before], [], after
            cities = random.sample(CITIES, needles)
            lines = []
            for group in (first, second):
                for size in group:
                    lines.append(naive_filler(tokenizer, size))
                    city = cities.pop()
                    lines.append(f"The special magic {city} number is: {random.randint(1, 50000)}")
                if group is first:
                    asked = city
            lines.append(naive_filler(tokenizer, last))
            lines.append(f"What is the special magic {asked} number? The special magic {asked} number is ")
            found.append(HEAD + "\n".join(lines) + " ")
    return found


def test_first_prompt_by_hand(tmp_path: Path) -> None:
    """random.seed(0): entry 49 of the cities, Doha, and 49674. "x y " is 3 tokens: 9 of 10 are used, as "z " is 2."""
    (tmp_path / "only.txt").write_text("x y\nlong line\nx y\nz\n")
    first = texts(Needle(lengths=[160], filler=str(tmp_path)), WordTokenizer())[0]
    assert first == (
        "There is a special magic number inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the magic number there. \n"
        "The special magic Doha number is 49674 . \n"
        "x y long line x y \n"
        "What is the special magic Doha number? The special magic Doha number is  "
    )


@pytest.mark.parametrize(("lengths", "samples"), [([170, 260], 2), ([151], 10)])
def test_prompts_are_the_protocols(folder: Path, lengths: list[int], samples: int) -> None:
    tokenizer = WordTokenizer()
    task = Needle(lengths=lengths, filler=str(folder), samples=samples)
    assert texts(task, tokenizer) == naive_needle(tokenizer, lengths, samples)


@pytest.mark.parametrize("needles", [1, 2, 4, 8])
def test_several_needles_are_the_protocols(folder: Path, needles: int) -> None:
    tokenizer = WordTokenizer()
    task = MultiNeedle(lengths=[400], filler=str(folder), needles=needles)
    assert texts(task, tokenizer) == naive_multi_needle(tokenizer, 400, needles)


def test_stream_runs_through_all_cells(folder: Path) -> None:
    """A cell alone has other prompts than in the whole grid, as with the authors."""
    both = texts(Needle(lengths=[200, 300], filler=str(folder)), WordTokenizer())
    assert both == texts(Needle(lengths=[200, 300], filler=str(folder)), WordTokenizer())
    assert both[110:] != texts(Needle(lengths=[300], filler=str(folder)), WordTokenizer())


def test_asked_needle_stands_at_its_depth(folder: Path) -> None:
    task = MultiNeedle(lengths=[2000], filler=str(folder), needles=4, distinct_cities=True)
    tokenizer = WordTokenizer()
    for sample in task.plan(load_filler(str(folder), tokenizer)):
        needle = f"The special magic {sample.city} number is: {sample.number}"
        at = sample.lines.index(needle)
        assert [line for line in sample.lines if str(line).startswith(f"The special magic {sample.city} ")] == [needle]
        before = sum(line.tokens for line in sample.lines[:at] if not isinstance(line, str))
        # Each stretch ends less than a line of 5 tokens before its size.
        assert 1850 * sample.depth - 5 * 4 - 1 < before <= 1850 * sample.depth


@pytest.mark.parametrize(("needles", "share"), [(2, 0.007), (4, 0.022), (8, 0.051)])
def test_share_of_ambiguous_prompts(needles: int, share: float) -> None:
    """By hand, from the cities' counts: the asked one is city i with n_i / 100, and its likes are left out of all."""
    counts = Counter(CITIES).values()
    exact = sum(n / 100 * (1 - math.comb(100 - n, needles - 1) / math.comb(99, needles - 1)) for n in counts)
    assert exact == pytest.approx(share, abs=0.0015)
    tokenizer = WordTokenizer()
    task = MultiNeedle(lengths=[400], filler="noise", needles=needles, samples=300)
    notes = task.summarise([], tokenizer).notes
    assert notes["ambiguous_prompts"] == pytest.approx(exact, abs=4 * math.sqrt(exact / 3000))
    distinct = MultiNeedle(lengths=[400], filler="noise", needles=needles, samples=300, distinct_cities=True)
    assert distinct.summarise([], tokenizer).notes["ambiguous_prompts"] == 0


def test_strip_ends_with_a_word(folder: Path) -> None:
    tokenizer = WordTokenizer()
    bare = texts(Needle(lengths=[200], filler=str(folder), strip=True), tokenizer)
    assert bare == [text.removesuffix("  ") for text in texts(Needle(lengths=[200], filler=str(folder)), tokenizer)]
    assert bare[0].endswith(" number is")


def test_scores_by_length_and_depth(folder: Path) -> None:
    tokenizer = WordTokenizer()
    task = Needle(lengths=[200, 300], filler=str(folder), depths=3, samples=2)
    plan = task.plan(load_filler(str(folder), tokenizer))
    # Right: all at depth 0, the first sample of length 300 at depth 1; a longer number holds a shorter one.
    right = [sample.depth == 0 or index == 10 for index, sample in enumerate(plan)]
    answers = [tokenizer.encode(f"it is 9{sample.number}" if good else "no") for sample, good in zip(plan, right)]
    result = task.summarise(answers, tokenizer)
    assert result.metrics == {"accuracy": 5 / 12}
    assert result.chance == {"accuracy": 0}
    assert result.grid is not None
    assert (result.grid.rows, result.grid.columns) == ((0, 0.5, 1), (200, 300))
    assert result.grid.values == ((1, 1), (0, 0), (0, 0.5))
    assert result.curves[0].y == (1 / 3, 1 / 2)
    assert [record["right"] for record in result.records] == right
    assert result.notes["filler"]["source"] == str(folder) and result.notes["filler"]["files"] == 3


def test_partial_answers_leave_cells_empty(folder: Path) -> None:
    task = Needle(lengths=[200, 300], filler=str(folder), depths=2, samples=1)
    result = task.summarise([[]], WordTokenizer())
    assert result.grid is not None and result.grid.values == ((0, None), (None, None))
    assert result.curves[0].y == (0, pytest.approx(math.nan, nan_ok=True))
    assert result.counts == {"prompts": 1}


def test_random_answers_are_wrong(folder: Path) -> None:
    tokenizer = WordTokenizer()
    task = Needle(lengths=[300], filler=str(folder))
    tokenizer.encode(" ".join(f"{number:05}" for number in range(50001, 60000)))
    rng = random.Random(1)
    answers = [[rng.randrange(2, len(tokenizer.words)) for _ in range(20)] for _ in range(110)]
    result = task.summarise(answers, tokenizer)
    assert result.metrics["accuracy"] - result.chance["accuracy"] < 0.05  # short numbers occur in longer ones


def test_longest_bounds_every_prompt(folder: Path) -> None:
    tokenizer = WordTokenizer()
    for task in (
        Needle(lengths=[200, 500], filler=str(folder)),
        MultiNeedle(lengths=[500], filler="noise", needles=4),
        Needle(lengths=[200], filler=str(folder), strip=True),
    ):
        most = max(len(request.prompt) + request.max_new_tokens for request in task.requests(tokenizer))
        # These words count the space at the end of every line, which the next line's first word takes.
        assert most <= task.longest(tokenizer) <= max(task.lengths)


def test_prompts_are_written_when_asked_for(folder: Path) -> None:
    """Only lines are encoded before, each once."""
    tokenizer = WordTokenizer()
    asked: list[str] = []
    encode = tokenizer.encode
    tokenizer.encode = lambda text: asked.append(text) or encode(text)  # type: ignore[func-returns-value, method-assign]
    requests = Needle(lengths=[1 << 17], filler="noise").requests(tokenizer)
    assert len(requests) == 110 and len(asked) == 1
    assert len(requests[109].prompt) > 120_000
    assert len(requests[3:5]) == 2 and len(asked) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lengths": []}, ["'lengths' is empty"]),
        ({"lengths": [4096, 150]}, ["'lengths' has 150"]),
        ({"depths": 1}, ["'depths' is 1"]),
        ({"samples": 0}, ["'samples' is 0"]),
        ({"filler": "nowhere"}, ["'filler' nowhere", "'noise'"]),
        ({"needles": 0}, ["'needles' is 0", "100"]),
        ({"needles": 70, "distinct_cities": True}, ["'needles' is 70", "69"]),
        ({"lengths": [160], "needles": 8}, ["'lengths' has 160", "'needles'"]),
    ],
)
def test_bad_settings(settings: dict, words: list[str]) -> None:
    make = MultiNeedle if "needles" in settings else Needle
    with pytest.raises(ValueError) as error:
        make(**{"lengths": [1024], "filler": "noise"} | settings)
    assert all(word in str(error.value) for word in words)


def test_filler_without_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.txt file"):
        Needle(lengths=[200], filler=str(tmp_path))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="are empty"):
        Needle(lengths=[200], filler=str(tmp_path)).requests(WordTokenizer())
    (tmp_path / "other.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"other\.txt is not text"):
        Needle(lengths=[200], filler=str(tmp_path)).requests(WordTokenizer())


def test_lines_that_leave_prompts_short(tmp_path: Path) -> None:
    """A book in one line fills nothing."""
    (tmp_path / "book.txt").write_text("word " * 300)
    with pytest.raises(ValueError, match="a prompt of 400 tokens would have 150, as lines are taken whole"):
        Needle(lengths=[400], filler=str(tmp_path)).longest(WordTokenizer())
    (tmp_path / "book.txt").write_text("word word word\n" * 100)
    assert Needle(lengths=[400], filler=str(tmp_path)).summarise([], WordTokenizer()).notes["shortest"] == 0.985
