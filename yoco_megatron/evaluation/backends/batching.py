"""Requests into batches of similar length, and their answers back into the order of the requests. Plain Python."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from yoco_megatron.utils.errors import require

HELD_TOKENS, HELD_REQUESTS = 1 << 22, 1 << 12
"""What is sorted by length at a time: prompts may be built when they are asked for, and all of them may be many."""


def in_order(
    requests: Iterable[Any],
    length: Callable[[Any], int],
    max_length: int,
    answer: Callable[[list[Any]], Iterator[tuple[int, Any]]],
) -> Iterator[Any]:
    """Answers in the order of the requests, each as soon as it and those before it are known.

    Args:
        length: tokens of a request's longest sequence.
        max_length: that of the model.
        answer: yields (index, answer) for each of a list of requests, in any order.
    Raises:
        ValueError: a sequence that is too long.
    """
    for window in _windows(requests, length, max_length):
        known: dict[int, Any] = {}
        following = 0
        for index, one in answer(window):
            known[index] = one
            while following in known:
                yield known.pop(following)
                following += 1
        assert following == len(window), "requests without an answer"


def _windows(requests: Iterable[Any], length: Callable, max_length: int) -> Iterator[list[Any]]:
    window: list[Any] = []
    tokens = 0
    for request in requests:
        size = length(request)
        require(size <= max_length, f"a sequence of {size:,} tokens: those of the model end at {max_length:,}")
        if window and (tokens + size > HELD_TOKENS or len(window) == HELD_REQUESTS):
            yield window
            window, tokens = [], 0
        window.append(request)
        tokens += size
    if window:
        yield window


def batches(
    keys: Sequence[Hashable], lengths: Sequence[int], costs: Sequence[int], budget: int, spread: int = 0
) -> Iterator[list[int]]:
    """Indices of the items of each batch; the longest come first, so that what does not fit in memory fails at once.

    Args:
        keys: equal within a batch; lengths: differ by at most `spread` within one.
        costs: tokens that an item takes. The largest of a batch, times its items, is at most `budget`, or it is alone.
    """
    by_key: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        by_key.setdefault(key, []).append(index)
    for items in by_key.values():
        items.sort(key=lambda index: -lengths[index])
        batch: list[int] = []
        largest = 0
        for index in items:
            cost = max(largest, costs[index])
            if batch and (lengths[batch[0]] - lengths[index] > spread or cost * (len(batch) + 1) > budget):
                yield batch
                batch, cost = [], costs[index]
            batch.append(index)
            largest = cost
        yield batch
