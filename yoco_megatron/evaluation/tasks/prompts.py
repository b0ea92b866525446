"""Prompts to continue, built when they are asked for: 880 of a million tokens do not fit into memory at once."""

from collections.abc import Callable, Sequence
from typing import Any, overload

from yoco_megatron.evaluation.requests import Generate, Tokenizer


class Lazy[Item, Request](Sequence[Request]):
    """The requests that `build` makes of `items`."""

    def __init__(self, build: Callable[[Item], Request], items: Sequence[Item]) -> None:
        self.build, self.items = build, items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Request: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Request]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Lazy(self.build, self.items[index])
        return self.build(self.items[index])


def to_continue(tokenizer: Tokenizer, text: str, max_new_tokens: int, expected: str) -> Generate:
    """Ask for the greedy continuation of a document that begins with `text`; `expected` is a right answer."""
    return Generate(
        prompt=(*tokenizer.start, *tokenizer.encode(text)),
        max_new_tokens=max_new_tokens,
        stop=frozenset() if tokenizer.end is None else frozenset({tokenizer.end}),
        banned=tokenizer.banned,
        expected=tuple(tokenizer.encode(expected)),
    )
