"""Batches of requests: within the budget, of alike items, and answers in the order of the requests."""

import random

import pytest

from yoco_megatron.evaluation.backends import batching
from yoco_megatron.evaluation.backends.batching import batches, in_order


def test_as_many_as_the_budget_has_room_for() -> None:
    assert list(batches("aaaaa", [4] * 5, [4] * 5, 8)) == [[0, 1], [2, 3], [4]]
    assert list(batches("aaaa", [4, 3, 2, 9], [4, 3, 2, 9], 8, spread=9)) == [[3], [0, 1], [2]]  # 9 alone is too much


def test_batches_of_alike_items() -> None:
    rng = random.Random(3)
    keys, lengths = [rng.choice("ab") for _ in range(200)], [rng.randint(1, 40) for _ in range(200)]
    costs = [length * rng.randint(1, 3) for length in lengths]
    found = list(batches(keys, lengths, costs, 150, spread=5))
    assert sorted(index for batch in found for index in batch) == list(range(200))
    for batch in found:
        assert len({keys[index] for index in batch}) == 1
        own = [lengths[index] for index in batch]
        assert own == sorted(own, reverse=True) and own[0] - own[-1] <= 5
        assert len(batch) == 1 or max(costs[index] for index in batch) * len(batch) <= 150
    assert max(map(len, found)) > 5


def test_answers_come_in_order_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "HELD_TOKENS", 10)
    windows = []

    def backwards(window: list[int]):
        windows.append(window)
        return ((index, -window[index]) for index in reversed(range(len(window))))

    requests = [3, 4, 3, 9, 2, 1]
    assert list(in_order(requests, int, 9, backwards)) == [-one for one in requests]
    assert windows == [[3, 4, 3], [9], [2, 1]]
    with pytest.raises(ValueError, match="a sequence of 9 tokens: those of the model end at 8"):
        list(in_order(requests, int, 8, backwards))
