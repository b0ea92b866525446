"""RULER prompts: its templates, needles that stand once, and answers that follow from the text alone."""

import re
from collections import Counter
from pathlib import Path

import pytest
from support.word_tokenizer import WordTokenizer

from yoco_megatron.evaluation.tasks.filler import load_filler
from yoco_megatron.evaluation.tasks.ruler import Ruler, Which
from yoco_megatron.evaluation.tasks.ruler_prompts import SUBTASKS, Prompt, insert

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
BOOK = "It was cold. Was it? “Yes!” he said. So they went home, and that was all.\n"
SIZES = {"niah_multikey_3": 10, "niah_multikey_2": 10}


@pytest.fixture
def book(tmp_path: Path) -> str:
    (tmp_path / "book.txt").write_text(BOOK * 3)
    return str(tmp_path)


def prompt(subtask: str, size: int = 8, length: int = 4096, index: int = 0, filler: str | None = None) -> Prompt:
    task = Ruler(lengths=[length], subtasks=[subtask], filler=filler)
    return task.prompt(Which(subtask, length, index), size, WordTokenizer())


def test_single_needle_in_noise() -> None:
    made = prompt("niah_single_1", size=20)
    head, *lines, question = made.text.split("\n")
    assert head == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert lines.count(NOISE) == 20
    (needle,) = set(lines) - {NOISE}
    found = re.fullmatch(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: ([1-9]\d{6})\.", needle)
    assert found is not None and made.answers == (found[2],)
    assert question == (
        f"What is the special magic number for {found[1]} mentioned in the provided text?"
        f" The special magic number for {found[1]} mentioned in the provided text is"
    )


@pytest.mark.parametrize(
    ("subtask", "needles", "answers"), [("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4), ("niah_multikey_1", 4, 1)]
)
def test_needles_in_essays(subtask: str, needles: int, answers: int, book: str) -> None:
    made = prompt(subtask, size=30, filler=book)
    body, question = made.text.split("\n")[1:]
    pairs = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", body)
    assert len(pairs) == needles and len(made.answers) == answers
    asked = re.findall(r"[a-z]+-[a-z]+", question.split("?")[0])
    assert {value for key, value in pairs if key in asked} == set(made.answers)
    plain = re.sub(r"One of the special magic numbers for \S+ is: \d{7}\. ?", "", body).split()
    assert plain == (BOOK * 30).split()[: len(plain)]
    start = "What are all the special magic numbers for " if answers > 1 else "What is the special magic number for "
    assert question.startswith(start)
    if subtask == "niah_multiquery":
        assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned in the provided text\?", question)
        assert made.text.startswith("Some special magic numbers are hidden within the following text.")


@pytest.mark.parametrize(
    ("subtask", "key", "kind"),
    [("niah_multikey_2", r"[a-z]+-[a-z]+", "number"), ("niah_multikey_3", r"[-0-9a-f]{36}", "uuid")],
)
def test_haystack_of_needles(subtask: str, key: str, kind: str) -> None:
    made = prompt(subtask, size=50)
    needles = re.findall(rf"One of the special magic {kind}s for ({key}) is: (\S+)\.\n", made.text)
    assert len(needles) == 51 and len(dict(needles)) == 51
    asked = re.search(rf"What is the special magic {kind} for ({key}) mentioned", made.text)
    assert asked is not None and made.answers == (dict(needles)[asked[1]],)


def test_variables_follow_the_chain() -> None:
    made = prompt("vt", size=30)
    example, text = made.text.split("\n\nMemorize and track")
    question = re.search(r"Find all variables that are assigned the value (\d{5}) in the text above\.", text)
    assert question is not None
    value = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\n", text))
    assert len(value) == 5 and text.count(NOISE) == 30
    for name in made.answers:
        while name in value:
            name = value[name]
        assert name == question[1]
    assert text.endswith(
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        f"value {question[1]}, they are: "
    )
    assert re.search(r"they are: [A-Z]{3}( [A-Z]{3}){4}$", example)


@pytest.mark.parametrize(
    ("size", "length", "often", "seldom"),  # of so many words, some would be the common ones
    [(12, 4096, 30, 3), (500, 8192, 30, 3), (300, 2048, 6, 1), (60_000, 16384, 30, 3)],
)
def test_common_words_are_the_common_ones(size: int, length: int, often: int, seldom: int) -> None:
    made = prompt("cwe", size=size, length=length)
    example, text = made.text.split("\nBelow is a numbered list of words.")
    listed = re.findall(r"(\d+)\. (\D+?)(?: |$)", text.split("\nQuestion:")[0])
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    counts = Counter(word for _, word in listed)
    assert {word for word, count in counts.items() if count == often} == set(made.answers)
    assert sorted(counts.values()) == [seldom] * size + [often] * 10
    assert text.endswith("Answer: The top 10 words that appear most often in the list are:")
    solved = re.findall(r"\d+\. (\S+)", example.split("list are:")[1])
    shown = Counter(re.findall(r"\d+\. (\S+)", example.split("\nQuestion")[0]))
    assert sorted(solved) == sorted(word for word, _ in shown.most_common(10)) and len(solved) == 10


@pytest.mark.parametrize("size", [1, 200, 3000])
def test_frequent_words_are_the_frequent_ones(size: int) -> None:
    made = prompt("fwe", size=size, length=4096)
    text = made.text.split("Find the three most frequently appeared coded words. ")[1].split("\nQuestion:")[0]
    ranked = Counter(text.split()).most_common(5)
    assert [word for word, _ in ranked[:4]] == ["...", *made.answers]
    assert len({count for _, count in ranked}) == 5 or size == 1
    assert len({count for _, count in ranked[:4]}) == 4
    # k^-2 / zeta(2) of the words, as whole numbers.
    assert size == 1 or [count for _, count in ranked[:3]] == [int(size * 6 / 9.8696044 / k**2) for k in (1, 2, 3)]


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_prompts_fill_their_length(subtask: str, book: str) -> None:
    tokenizer = WordTokenizer()
    task = Ruler(lengths=[1024, 4096], subtasks=[subtask], samples=3, filler=book)
    requests = task.requests(tokenizer)
    assert len(requests) == 6
    for index, request in enumerate(requests):
        length = 1024 if index < 3 else 4096
        assert 0.9 * length < len(request.prompt) + request.max_new_tokens <= length
        assert request.prompt[0] == 0
    assert task.longest(tokenizer) == 4096
    assert [request.prompt for request in requests] == [request.prompt for request in task.requests(tokenizer)]


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_answers_do_not_depend_on_the_size(subtask: str, book: str) -> None:
    """The scores are computed from the smallest prompts."""
    assert prompt(subtask, 1, filler=book).answers == prompt(subtask, 40, filler=book).answers
    assert prompt(subtask, 40, filler=book).answers != prompt(subtask, 40, index=1, filler=book).answers


def test_score_is_the_share_of_answers_found() -> None:
    tokenizer = WordTokenizer()
    task = Ruler(lengths=[1024, 2048], subtasks=["vt", "niah_single_1"], samples=1)
    plan = [Which(name, length, 0) for name in ("vt", "niah_single_1") for length in (1024, 2048)]
    expected = [task.prompt(which, 1, tokenizer).answers for which in plan]
    given = [" ".join(expected[0]).lower(), " ".join(expected[1][:2]), "none", expected[3][0]]
    result = task.summarise([tokenizer.encode(text) for text in given], tokenizer)
    assert result.metrics == pytest.approx({"average": 0.6, "vt": 0.7, "niah_single_1": 0.5})
    assert result.chance == {"average": 0, "vt": 0, "niah_single_1": 0}
    assert [curve.y for curve in result.curves] == [(1, 0.4), (0, 1)]
    assert [record["right"] for record in result.records] == [True, False, False, True]


def test_needles_keep_their_order() -> None:
    assert insert(["a", "b", "c"], [2, 0], ["1", "2"]) == ["1", "a", "b", "2", "c"]


def test_sentences_of_a_book_repeat(book: str) -> None:
    filler = load_filler(book, WordTokenizer())
    assert filler.first_sentences(14)[:3] == ["It was cold.", "Was it?", "“Yes!” he said."]
    assert filler.first_sentences(14)[12:] == ["It was cold.", "Was it?"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lengths": []}, ["'lengths' is empty"]),
        ({"subtasks": ["vtt"]}, ["'vtt'", "vt?"]),
        ({"subtasks": []}, ["'subtasks' is empty"]),
        ({"subtasks": ["niah_single_2"]}, ["niah_single_2", "'filler'"]),
        ({"subtasks": ["niah_single_2"], "filler": "noise"}, ["niah_single_2", "'filler'"]),
        ({"samples": 0}, ["'samples' is 0"]),
    ],
)
def test_bad_settings(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        Ruler(**{"lengths": [4096]} | settings)
    assert all(word in str(error.value) for word in words)


def test_length_too_short() -> None:
    with pytest.raises(ValueError, match="'lengths' has 100, too few tokens for niah_single_1"):
        Ruler(lengths=[4096, 100]).longest(WordTokenizer())


def test_every_smallest_prompt_must_fit() -> None:
    class Letters(WordTokenizer):
        def encode(self, text: str) -> list[int]:
            return list(map(ord, text))

    one, two = (Ruler(lengths=[566], subtasks=["niah_single_1"], samples=samples) for samples in (1, 2))
    requests = [two.request(Which("niah_single_1", 566, index), 1, Letters()) for index in (0, 1)]
    first, second = (len(request.prompt) + request.max_new_tokens for request in requests)
    assert first <= 566 < second
    assert one.longest(Letters()) == 566
    with pytest.raises(ValueError, match="too few tokens for niah_single_1"):
        two.longest(Letters())
