"""Which datasets the data flags name, with which weights, read more strictly than Megatron does.

Megatron asserts without a text, once the model is built, or reads something else: "110,-5,-5" as 110, 5 and 5.
"""

import math
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yoco_megatron.utils.errors import require
from yoco_megatron.utils.small_files import read_json, read_text

PARTS = ("train", "valid", "test")
Blend = tuple[list[str], list[float] | None]
"""Prefixes, and their weights or None: each is read once."""

OF_ALL_PARTS = ("data_path", "data_args_path")  # cut by --split
OF_EACH_PART = ("train_data_path", "valid_data_path", "test_data_path")
PER_SPLIT_FILE = "per_split_data_args_path"
DATA_FLAGS = (*OF_ALL_PARTS, *OF_EACH_PART, PER_SPLIT_FILE)
FORM = "give prefixes 'P1 P2 ...', or a weight for each, 'W1 P1 W2 P2 ...'"


def flag_of(dest: str) -> str:
    """--data-path of data_path."""
    return "--" + dest.replace("_", "-")


def read_blends(args: Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """(blend of all parts, None) or (None, [of train, of valid, of test]); (None, None) for no data flag.

    Raises:
        ValueError: a list or file that cannot be read, or flags that contradict each other; names the flag.
    """
    given = [dest for dest in DATA_FLAGS if getattr(args, dest) is not None]
    per_part = all(dest in OF_EACH_PART for dest in given)
    require(
        len(given) <= 1 or per_part,
        f"{' and '.join(map(flag_of, given))} contradict each other: keep one of them, or one for each of train, valid "
        "and test",
    )
    if not given:
        return None, None
    dest = given[0]
    flag, value = flag_of(dest), getattr(args, dest)
    if dest in OF_ALL_PARTS:
        if dest == "data_args_path":
            flag, value = f"{flag} {value}", _content(flag, read_text, value).split()
        return _blend(flag, value), None
    split = getattr(args, "split", None)
    require(split is None, f"--split {split} has no effect with {flag}, where each part has its own data: remove it")
    if dest == PER_SPLIT_FILE:
        lists = _per_split(flag, value)
        return None, [_blend(f"{flag} {value}: {part}", lists[part]) for part in PARTS]
    return None, [_blend(flag_of(dest), getattr(args, dest)) for dest in OF_EACH_PART]


def _per_split(flag: str, path: str) -> dict[str, list[str] | None]:
    """Words by part, None for a part without data."""
    form = (
        f'{flag} {path} must hold JSON as {{"train": LIST, "valid": LIST, "test": LIST}}, null for a part without data'
    )
    content = _content(flag, read_json, path)
    require(sorted(content) == sorted(PARTS), form)
    lists = {name: value.split() if isinstance(value, str) else value for name, value in content.items()}
    for name, words in lists.items():
        good = words is None or (isinstance(words, list) and all(isinstance(word, str | int | float) for word in words))
        require(good, f"{form}: {name} is no list of prefixes, or of weights and prefixes")
    return {name: None if words is None else [str(word) for word in words] for name, words in lists.items()}


def _content(flag: str, read: Callable[[Path], Any], path: str) -> Any:
    try:
        return read(Path(path))
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from None


def _blend(flag: str, words: list[str] | None) -> Blend | None:
    """As megatron.core.datasets.utils.get_blend_from_list reads it."""
    if words is None:
        return None
    words = [word.strip() for word in words]
    require(bool(words) and all(words), f"{flag} is empty: {FORM}")
    weights = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(weight is None for weight in weights):
        return words, None
    for word, weight in zip(words[::2], weights):
        require(weight is not None, f"{flag}: {word!r} is no weight, which other datasets there have: {FORM}")
        require(
            weight is not None and 0 < weight < math.inf,
            f"{flag}: the weight {word} must be a number above 0; leave out a dataset that is not to be read",
        )
    numbers = [weight for weight in weights if weight is not None]
    total = sum(numbers)
    require(min(numbers) / total > 0, f"{flag}: the weights are too far apart: {min(numbers)} of {total} is nothing")
    return words[1::2], numbers


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def shares(split: str) -> list[float]:
    """Shares of train, valid and test by --split, which add up to 1; those that are left out are 0.

    Raises:
        ValueError: no shares.
    """
    numbers = [float(word) if re.fullmatch(r"\d+\.?\d*|\.\d+", word.strip()) else -1.0 for word in split.split(",")]
    require(
        0 < len(numbers) <= len(PARTS) and min(numbers) >= 0 and 0 < sum(numbers) < math.inf,
        f"--split {split}: give the shares of train, valid and test, such as 98,1,1: at most three numbers of at least "
        "0, not all of them 0",
    )
    return [number / sum(numbers) for number in numbers] + [0.0] * (len(PARTS) - len(numbers))
