"""Loss of the same last tokens with more and more before them: how far back a model makes use of its context.

From each document that is long enough, the first max(contexts) + last tokens are taken; the loss is that of the `last`
of them, given the 4K, 16K, ... before. The document's beginning counts as one of them where it is within reach.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from yoco_megatron.evaluation.requests import Curve, Result, Tokenizer, TokenLosses, mean
from yoco_megatron.evaluation.tasks.documents import check_data, iter_documents
from yoco_megatron.evaluation.tasks.settings import check_counts, check_not_empty
from yoco_megatron.utils.errors import require


@dataclass(frozen=True, kw_only=True)
class LossByContext:
    """Settings.

    contexts: tokens before the last ones. last: tokens whose loss is measured. data, limit, key: as in LossByPosition;
    `limit` counts documents that are long enough.
    """

    kind: ClassVar = TokenLosses
    name: str = "loss_by_context"
    data: str
    contexts: list[int]
    last: int = 4096
    limit: int = 16
    key: str = "text"

    def __post_init__(self) -> None:
        check_not_empty(self, "contexts")
        require(min(self.contexts) >= 1, f"'contexts' has {min(self.contexts)}, and must be at least 1")
        check_counts(self, "last", "limit")
        check_data(self.data)

    def requests(self, tokenizer: Tokenizer) -> Sequence[TokenLosses]:
        """One for each document and context, the contexts of a document side by side."""
        size = self.longest(tokenizer)
        documents = (each.tokens[:size] for each in iter_documents(self.data, tokenizer, self.key))
        long = list(itertools.islice((tokens for tokens in documents if len(tokens) == size), self.limit))
        require(bool(long), f"no document of {self.data} has the {size} tokens that 'contexts' and 'last' need")
        return [
            TokenLosses(tokens[size - self.last - context :], context) for tokens in long for context in self.contexts
        ]

    def longest(self, tokenizer: Tokenizer) -> int:
        """The longest context and the last tokens."""
        return max(self.contexts) + self.last

    def summarise(self, answers: Sequence[Any], tokenizer: Tokenizer) -> Result:
        """The mean loss with each context."""
        number = len(answers) // len(self.contexts)  # whole documents
        own = [
            [
                np.asarray(losses, np.float64).mean()
                for losses in answers[at : number * len(self.contexts) : len(self.contexts)]
            ]
            for at in range(len(self.contexts))
        ]
        means = [float(mean(losses)) for losses in own]
        return Result(
            metrics={f"loss_{context}": value for context, value in zip(self.contexts, means)},
            counts={"documents": number, "tokens": number * self.last},
            notes={"data": self.data, "last": self.last},
            curves=(
                Curve(
                    *("loss by context", "tokens before", "nats", tuple(map(float, self.contexts)), tuple(means)),
                    (number * self.last,) * len(means),
                ),
            ),
        )
