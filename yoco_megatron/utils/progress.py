"""How far long work is: a bar on a terminal, a line each ten seconds in a log."""

import sys
from typing import Any, TextIO

from tqdm import tqdm

SECONDS = 10.0
LINE = "{desc}: {percentage:3.0f}%, {n_fmt} of {total_fmt} in {elapsed}, {remaining} left, {rate_fmt}{postfix}"


class _Lines:
    """What tqdm writes over and over in one line of a terminal, as lines of their own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        self._stream.flush()


def progress(*iterable: Any, **options: Any) -> tqdm:
    """tqdm with its arguments. In a log: nothing of what is done within `SECONDS`."""
    if sys.stderr.isatty():
        return tqdm(*iterable, **options)
    return tqdm(
        *iterable,
        file=_Lines(sys.stderr),
        mininterval=SECONDS,
        miniters=1,
        delay=SECONDS,
        bar_format=LINE,
        **options | {"leave": True},
    )
