"""Checks of settings that tasks have alike."""

from typing import Any

from yoco_megatron.utils.errors import require


def check_counts(task: Any, *names: str) -> None:
    """Raises ValueError for one of these settings that is given and is less than 1."""
    for name in names:
        value = getattr(task, name)
        require(value is None or value >= 1, f"{name!r} is {value}, and must be at least 1")


def check_not_empty(task: Any, name: str) -> None:
    """Raises ValueError for a list without an entry."""
    require(bool(getattr(task, name)), f"{name!r} is empty")
