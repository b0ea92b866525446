"""Loss by position in the document, the paper's Fig. 5: does a token profit from what stands far before it?

Position p is the number of tokens before the predicted one. Bin k has the positions 2^k to 2^(k+1) - 1; the number of
tokens in each is in the curve, as long documents are few and of another kind. The same text with less before it, which
separates use of context from difficulty of text: loss_by_context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from yoco_megatron.evaluation.requests import Curve, Result, Tokenizer, TokenLosses
from yoco_megatron.evaluation.tasks.documents import check_data, read_documents
from yoco_megatron.evaluation.tasks.settings import check_counts
from yoco_megatron.utils.errors import require


@dataclass(frozen=True, kw_only=True)
class LossByPosition:
    """Settings.

    data: prefix of a Megatron dataset, .jsonl file, file of text, or folder of .txt files. length: where longer
    documents are cut, in tokens. limit: documents; null: all. key: of the text in JSON lines.
    """

    kind: ClassVar = TokenLosses
    name: str = "loss_by_position"
    data: str
    length: int
    limit: int | None = 128
    key: str = "text"

    def __post_init__(self) -> None:
        require(self.length >= 2, f"'length' is {self.length}, and must be at least 2")
        check_counts(self, "limit")
        check_data(self.data)

    def requests(self, tokenizer: Tokenizer) -> Sequence[TokenLosses]:
        """One for each document."""
        documents = read_documents(self.data, tokenizer, self.limit, self.key)
        return [TokenLosses(document.tokens[: self.length], 1) for document in documents]

    def longest(self, tokenizer: Tokenizer) -> int:
        """Tokens of the longest document, at most `length`."""
        return max(len(request.tokens) for request in self.requests(tokenizer))

    def summarise(self, answers: Sequence[Any], tokenizer: Tokenizer) -> Result:
        """The mean loss, that of each bin, and the cumulative mean up to its end."""
        most = max((len(losses) for losses in answers), default=0)
        sums, counts = np.zeros(most + 1), np.zeros(most + 1, np.int64)
        for losses in answers:
            sums[1 : len(losses) + 1] += np.asarray(losses, np.float64)
            counts[1 : len(losses) + 1] += 1
        starts = [1 << k for k in range(most.bit_length())]  # position 0 has no loss
        bin_sums, bin_counts = (np.add.reduceat(each, starts) if starts else each[:0] for each in (sums, counts))
        curves = []
        for name, over, count in (
            ("loss by position", bin_sums, bin_counts),
            ("cumulative mean loss", bin_sums.cumsum(), bin_counts.cumsum()),
        ):
            x = tuple(map(float, starts))
            curves.append(Curve(name, "position", "nats", x, tuple((over / count).tolist()), tuple(count.tolist())))
        last = {"loss_last_bin": float(bin_sums[-1] / bin_counts[-1])} if starts else {}
        return Result(
            metrics={"loss": float(sums.sum() / max(counts.sum(), 1))} | last,
            counts={"documents": len(answers), "tokens": int(counts.sum())},
            notes={"data": self.data, "bins": "x is the first position of its bin, which ends before twice that"},
            curves=tuple(curves),
        )
