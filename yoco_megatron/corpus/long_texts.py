"""Ids of a very long text from a Hugging Face tokenizer, piece by piece, in memory that is flat.

The library keeps about 140 bytes for each byte that it encodes at once. A text can be cut where two of the tokenizer's
words meet: a pre-tokenizer that cuts words from left to right cuts on from there alike, and no token spans two words.
So every piece begins where words are known to meet, and ends well after the last place that is used of it, so that
nothing in it is decided by its end. What is known of no tokenizer is whether it looks farther back, or adds something
to the beginning of a text: each piece shows whether it does, as its end is encoded once more, from the cut on.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

# Characters that are encoded at a time, and how many of them before the end at the latest are cut off.
PIECE = 1 << 18
MARGIN = 1 << 13


def encode_in_pieces(core: Any, text: str) -> np.ndarray:
    """The ids of `core.encode(text, add_special_tokens=False)`, int64 [tokens].

    Args:
        core: a tokenizers.Tokenizer whose post-processor is removed, because it may move the borders of tokens.
    """
    return np.concatenate(list(_parts(core, text)))


def _parts(core: Any, text: str) -> Iterator[np.ndarray]:
    start, size = 0, PIECE
    while len(text) - start > size:
        coded = core.encode(text[start : start + size], add_special_tokens=False)
        tokens, chars = _last_border(coded, size - MARGIN)
        ids = np.array(coded.ids, np.int64)
        if tokens and np.array_equal(ids[tokens:], _ids(core, text[start + chars : start + size])):
            yield ids[:tokens]
            start, size = start + chars, PIECE
        else:  # one word, or a tokenizer that cannot be cut here: at the worst the whole text at once
            size *= 2
    yield _ids(core, text[start:])


def _ids(core: Any, text: str) -> np.ndarray:
    (coded,) = core.encode_batch_fast([text], add_special_tokens=False)
    return np.array(coded.ids, np.int64)


def _last_border(coded: Any, before: int) -> tuple[int, int]:
    """(tokens, characters) up to the last place before the character `before` where two words meet; (0, 0) if none."""
    words, offsets = coded.word_ids, coded.offsets
    for token in range(len(words) - 1, 0, -1):
        begin = offsets[token][0]
        meet = words[token] != words[token - 1] and offsets[token - 1][1] == begin
        if meet and begin <= before:
            return token, begin
    return 0, 0
