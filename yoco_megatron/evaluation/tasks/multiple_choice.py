"""The paper's Table 3: eight zero-shot tasks, scored by the likelihood of each choice, without a download.

    the choice with the largest log p(choice | context), also divided by its characters, and by its bytes

The scorer is the authors' (unilm/YOCO harness_task.py): a choice's tokens are encode(context + choice)[len(encode(
context)):], and contexts are cut on the left. bits_per_byte is of the right choice, its space left out, the mean over
documents: it ranks models whose accuracy is near chance.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from yoco_megatron.evaluation.requests import Likelihood, Result, Score, Tokenizer, mean
from yoco_megatron.evaluation.tasks.benchmarks import BENCHMARKS, Question, data_folder, read_benchmark
from yoco_megatron.evaluation.tasks.settings import check_counts
from yoco_megatron.utils.errors import nearest, require


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
        check_counts(self, "limit")
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
        left = (likelihood for answer in answers for likelihood in answer)
        records: list[dict[str, Any]] = []
        for question in self.questions():
            own = list(itertools.islice(left, len(question.choices)))
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
                metrics[f"{name}/{key}"] = mean(row[key] for row in rows)
                if key != "bits_per_byte":
                    chance[f"{name}/{key}"] = mean(1 / len(row["log_probabilities"]) for row in rows)
        reported = [f"{name}/{paper_metric(name)}" for name in self._names() if f"{name}/accuracy" in metrics]
        average = {"average": mean(metrics[key] for key in reported)}
        folder = data_folder(self.data)
        full = [
            one
            for one in self.requests(tokenizer)
            if len(one.context) + max(map(len, one.continuations)) >= self.max_length
        ]
        return Result(
            metrics=average | metrics,
            chance={"average": mean(chance[key] for key in reported)} | chance,
            counts={name: sum(record["benchmark"] == name for record in records) for name in self._names()},
            records=records,
            notes={
                "prompts": "lm-eval's, zero-shot",
                "contexts_at_max_length": len(full),
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

    def is_right(divisors: Sequence[int]) -> bool | float:
        scores = [value / divisor for value, divisor in zip(log_probabilities, divisors)]
        if any(map(math.isnan, scores)):  # a model that computes no numbers knows nothing, and scores nothing
            return math.nan
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
