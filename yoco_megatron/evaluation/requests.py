"""The terms between tasks, which know text and scores, and backends, which know a model. Plain Python.

A task makes requests of one kind; a backend answers them in their order, and the task scores the answers.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class Generate:
    """A greedy continuation; answered by its token ids, a stop id not among them.

    `banned` ids have logits of -inf. `expected` is a likely answer: a draft that a backend may verify in one pass; it
    never changes the result.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    banned: frozenset[int] = frozenset()
    expected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation: its log-probability (nats, summed over its tokens), and whether greedy decoding gives it."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True)
class Score:
    """Several continuations of one context; answered by one Likelihood each. None of them is empty."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TokenLosses:
    """Answered by the losses of tokens[first:], fp32 [len(tokens) - first], in nats, each given all tokens before it.

    `tokens` are ids, a tuple or an int64 array [T]; 1 <= first < T.
    """

    tokens: Any
    first: int


Request = Generate | Score | TokenLosses


class Tokenizer(Protocol):
    """What tasks need of a tokenizer (yoco_megatron/evaluation/tokenizer.py)."""

    start: tuple[int, ...]  # ids that a document begins with, as in training; often none, or <s>
    end: int | None  # the id that ends a document, </s>
    banned: frozenset[int]  # ids that no continuation has: <s> and padding
    rows: int  # its ids are below
    sha256: str | None  # of its files

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone, without `start` and `end`."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""

    def __hash__(self) -> int:
        """What was counted with a tokenizer is kept."""


class Backend(Protocol):
    """A model that answers requests, in their order, each as soon as it is known."""

    name: str
    tokenizer: Tokenizer
    max_length: int  # tokens of the longest sequence, prompt and continuation together

    def generate(self, requests: Sequence[Generate]) -> Iterator[list[int]]: ...

    def score(self, requests: Sequence[Score]) -> Iterator[list[Likelihood]]: ...

    def token_losses(self, requests: Sequence[TokenLosses]) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Grid:
    """A heat map: `values[row][column]`, from 0 to 1; None where nothing was measured."""

    row_name: str
    column_name: str
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Curve:
    """y over x, from `counts` items or tokens each."""

    name: str
    x_name: str
    y_name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    counts: tuple[int, ...]


def mean(values: Iterable[float]) -> float:
    """Of a task's values; NaN of none: what was not measured has no score."""
    found = list(values)
    return sum(found) / len(found) if found else math.nan


@dataclass(frozen=True)
class Result:
    """What a task found: all of it can be written as JSON.

    metrics: the scores; accuracies are from 0 to 1. NaN, null in JSON, where nothing was measured.
    chance: of some of the metrics, the score of a model that knows nothing.
    counts: of items, prompts or tokens.
    records: one an item: what was asked, what was answered, whether it was right.
    notes: what a reader must know to compare: the source of the text, the split, a share of ambiguous prompts.
    """

    metrics: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    curves: tuple[Curve, ...] = ()


class Task(Protocol):
    """A task with its settings (yoco_megatron/evaluation/suite.py reads them from a file).

    kind: the class of its requests.
    name: of this task in its suite and its results; it may be in a suite twice, with other settings and names.
    """

    kind: ClassVar[type[Generate] | type[Score] | type[TokenLosses]]

    @property
    def name(self) -> str: ...

    def longest(self, tokenizer: Tokenizer) -> int:
        """Tokens of its longest sequence, prompt and continuation together, or a bound close to it."""

    def requests(self, tokenizer: Tokenizer) -> Sequence[Any]:
        """Of class `kind`, the same on every rank and each time; items may be built when they are asked for."""

    def summarise(self, answers: Sequence[Any], tokenizer: Tokenizer) -> Result:
        """Score the answers to all requests, in their order; to the first ones, where `answers` are fewer."""


Progress = Callable[[int], None]
"""Called with the number of requests that have been answered."""
