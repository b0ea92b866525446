"""Helpers for user errors: one line that names the flag or file, and the fix."""

import difflib
from collections.abc import Iterable


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def nearest(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the known name closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
