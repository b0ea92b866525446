"""A backend without a model, for tests of what uses backends."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from yoco_megatron.evaluation.requests import Generate, Likelihood, Score, TokenLosses


class KnowingBackend:
    """Generates what is expected, prefers the first continuation, and has a loss of 1 nat everywhere.

    `before` is called before each answer.
    """

    name = "knowing"

    def __init__(self, tokenizer: Any, max_length: int = 4096, before: Callable[[], None] = lambda: None) -> None:
        self.tokenizer, self.max_length, self.before = tokenizer, max_length, before

    def generate(self, requests: Sequence[Generate]) -> Iterator[list[int]]:
        for one in requests:
            self.before()
            yield list(one.expected)

    def score(self, requests: Sequence[Score]) -> Iterator[list[Likelihood]]:
        for one in requests:
            self.before()
            yield [Likelihood(-1.0 - index, index == 0) for index in range(len(one.continuations))]

    def token_losses(self, requests: Sequence[TokenLosses]) -> Iterator[np.ndarray]:
        for one in requests:
            self.before()
            yield np.ones(len(one.tokens) - one.first, np.float32)
