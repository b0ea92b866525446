"""Token ids of a very long text, by a Hugging Face tokenizer in overlapping windows, with constant memory.

The library needs about 140 bytes per byte that it encodes at once. A text can be cut where two of the pre-tokenizer's
words meet: a pre-tokenizer that works from left to right splits the rest in the same way, and no token spans two words.
So each window begins at such a boundary, and only ids well before its end are used, so that its end decides none of
them. Whether a tokenizer looks back further, or adds something at the beginning of a text, is unknown: each window
checks it by encoding its tail once more, from the cut on.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

# Characters of a window, and of its tail, whose ids are not used.
WINDOW = 1 << 18
MARGIN = 1 << 13


def encode_in_windows(core: Any, text: str) -> np.ndarray:
    """The ids of `core.encode(text, add_special_tokens=False)`, int64 [tokens].

    Args:
        core: a tokenizers.Tokenizer whose post-processor is removed, because it may move token boundaries.
    """
    return np.concatenate(list(_window_ids(core, text)))


def _window_ids(core: Any, text: str) -> Iterator[np.ndarray]:
    start, size = 0, WINDOW
    while len(text) - start > size:
        coded = core.encode(text[start : start + size], add_special_tokens=False)
        tokens, chars = _last_word_boundary(coded, size - MARGIN)
        ids = np.array(coded.ids, np.int64)
        if tokens and np.array_equal(ids[tokens:], _ids(core, text[start + chars : start + size])):
            yield ids[:tokens]
            start, size = start + chars, WINDOW
        else:  # one word, or a tokenizer that cannot be cut here: in the worst case the whole text at once
            size *= 2
    yield _ids(core, text[start:])


def _ids(core: Any, text: str) -> np.ndarray:
    (coded,) = core.encode_batch_fast([text], add_special_tokens=False)
    return np.array(coded.ids, np.int64)


def _last_word_boundary(coded: Any, before: int) -> tuple[int, int]:
    """(tokens, characters) up to the last place before the character `before` where two words meet; (0, 0) if none."""
    words, offsets = coded.word_ids, coded.offsets
    for token in range(len(words) - 1, 0, -1):
        begin = offsets[token][0]
        meet = words[token] != words[token - 1] and offsets[token - 1][1] == begin
        if meet and begin <= before:
            return token, begin
    return 0, 0
