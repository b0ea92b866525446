"""Loss and bits per byte on any text, which compares models with different tokenizers.

Documents are cut into windows of `length` tokens, each `stride` further than the one before; every token is counted
once, in the window that has most before it. stride = length - 1: no token is computed twice. A small one gives every
token a long context, as in evaluations on Proof-Pile.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from yoco_megatron.evaluation.requests import Result, Tokenizer, TokenLosses
from yoco_megatron.evaluation.tasks.documents import check_data, read_documents
from yoco_megatron.evaluation.tasks.settings import check_counts
from yoco_megatron.utils.errors import require


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """Settings.

    length: tokens of a window. stride: at most length - 1, the default. data, limit, key: as in LossByPosition.
    """

    kind: ClassVar = TokenLosses
    name: str = "validation_loss"
    data: str
    length: int
    stride: int | None = None
    limit: int | None = 128
    key: str = "text"

    def __post_init__(self) -> None:
        require(self.length >= 2, f"'length' is {self.length}, and must be at least 2")
        most = self.length - 1
        require(1 <= self._stride <= most, f"'stride' is {self._stride}, and must be from 1 to 'length' - 1 = {most}")
        check_counts(self, "limit")
        check_data(self.data)

    @property
    def _stride(self) -> int:
        return self.length - 1 if self.stride is None else self.stride

    def _windows(self, size: int) -> list[tuple[int, int, int]]:
        """(begin, end, first scored token) of the windows of a document of so many tokens."""
        ends = [*range(self.length, size, self._stride), size]
        return [(max(end - self.length, 0), end, before) for before, end in zip([1, *ends], ends)]

    def requests(self, tokenizer: Tokenizer) -> Sequence[TokenLosses]:
        """The windows of all documents, in order."""
        documents = read_documents(self.data, tokenizer, self.limit, self.key)
        return [
            TokenLosses(document.tokens[begin:end], first - begin)
            for document in documents
            for begin, end, first in self._windows(len(document.tokens))
        ]

    def longest(self, tokenizer: Tokenizer) -> int:
        """Tokens of the longest window."""
        return max(len(request.tokens) for request in self.requests(tokenizer))

    def summarise(self, answers: Sequence[Any], tokenizer: Tokenizer) -> Result:
        """Mean nats of a token, perplexity, and bits per byte of the documents that are whole."""
        left = iter(answers)
        nats, tokens, num_bytes, documents = 0.0, 0, 0, 0
        for document in read_documents(self.data, tokenizer, self.limit, self.key):
            count = len(self._windows(len(document.tokens)))
            own = list(itertools.islice(left, count))
            if len(own) < count:
                break
            nats += sum(float(np.asarray(losses, np.float64).sum()) for losses in own)
            tokens += sum(map(len, own))
            num_bytes += document.predicted_bytes(tokenizer)
            documents += 1
        loss = nats / tokens if tokens else math.nan  # a limit may end before the first document does
        return Result(
            metrics={
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else math.nan,
            },
            counts={"documents": documents, "tokens": tokens, "bytes": num_bytes},
            notes={"data": self.data},
        )
