"""Token ids of many texts at once, each exactly as the tokenizer gives them text by text.

    encode(texts) -> Ids: all ids in one array, and how many belong to each text

Backends, the fastest first: gigatoken (for byte-level BPE and SentencePiece-like tokenizer.json files), then what the
tokenizer's own library does for a batch. None of them holds Python's lock for long, so threads can share an encoder.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from yoco_megatron.corpus.long_texts import WINDOW, encode_in_windows

BACKENDS = ("auto", "gigatoken", "library")
# What tokenizers disagree about: spaces, controls, marks that normalizers join, other scripts, digits, contractions.
HARD_TEXTS = (
    "  two  spaces ", "\n\n \t x\r\n", "\x00\x7f\u200d\ufeff", "cafe\u0301 Ⅷ ﬁ", "größer 漢字 🙂👩‍👩‍👧 हिन्दी",
    "1234567.89", "I'LL we've ’s", "a" * 1000, " " * 300, "naïve_snake CamelCase\\n", "x" + "\u0301" * 40, "",
)  # fmt: skip
# After the first calls one text per call, of at most this size, is encoded again to check that gigatoken agrees.
PROBE_BYTES = 4096
# In the first calls, up to this many bytes, all texts are.
FIRST_BYTES = 1 << 18


@dataclass(frozen=True)
class Ids:
    """ids: integers [tokens]; lengths: int64 [texts]."""

    ids: np.ndarray
    lengths: np.ndarray

    def of(self, index: int) -> np.ndarray:
        """Ids of one text."""
        end = int(self.lengths[: index + 1].sum())
        return self.ids[end - int(self.lengths[index]) : end]


Encoder = Callable[[list[bytes]], Ids]


def join(parts: list[Any]) -> Ids:
    """Ids of texts given one by one, as lists or arrays."""
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    if parts and isinstance(parts[0], np.ndarray):
        return Ids(np.concatenate(parts), lengths)
    return Ids(np.fromiter(chain.from_iterable(parts), np.int64, int(lengths.sum())), lengths)


def choose_encoder(tokenizer: Any, backend: str = "auto") -> tuple[str, Encoder]:
    """The encoder for a tokenizer that Megatron built, and the name of what it runs on.

    Args:
        backend: 'gigatoken', 'library', or 'auto': gigatoken where it is installed and knows the tokenizer.
    Raises:
        ValueError: gigatoken is requested but unavailable for this tokenizer.
    """
    name, library = library_encoder(tokenizer)
    if backend == "library":
        return name, library
    fast = gigatoken_encoder(tokenizer)
    problem = fast if isinstance(fast, str) else _disagreement(fast, library, _hard_texts(tokenizer))
    if problem is None:
        assert not isinstance(fast, str)
        return "gigatoken", compared(fast, library)
    if backend == "gigatoken":
        raise ValueError(f"--tokenizer-backend gigatoken: {problem}; remove the flag to use {name}")
    return name, library


def _hard_texts(tokenizer: Any) -> list[bytes]:
    core, _ = _rust_core(tokenizer)
    special = [token.content for token in core.get_added_tokens_decoder().values()][:50]
    around = [text for token in special for text in (token, f"one {token} two", f"x{token[:-1]}", token * 2)]
    return [text.encode() for text in (*HARD_TEXTS, *around)]


def _disagreement(fast: Encoder, exact: Encoder, texts: list[bytes]) -> str | None:
    found, wanted = fast(texts), exact(texts)
    for index, text in enumerate(texts):
        if not np.array_equal(found.of(index), wanted.of(index)):
            return f"its ids differ from the tokenizer's own for {text[:60].decode(errors='replace')!r}"
    return None


def compared(fast: Encoder, exact: Encoder) -> Encoder:
    """`fast`, but an error where it differs from `exact`: on all of the first texts, then on one short text a call."""
    checked = 0

    def encode(texts: list[bytes]) -> Ids:
        nonlocal checked
        found = fast(texts)
        first = checked < FIRST_BYTES
        probes = [index for index, text in enumerate(texts) if len(text) <= (FIRST_BYTES if first else PROBE_BYTES)]
        if not first and probes:  # another place in every call
            probes = [probes[checked % len(probes)]]
        checked += sum(map(len, texts))
        wanted = exact([texts[index] for index in probes])
        for place, index in enumerate(probes):
            if not np.array_equal(found.of(index), wanted.of(place)):
                raise ValueError(
                    "--tokenizer-backend: gigatoken's ids differ from the tokenizer's own for a text that begins "
                    f"with {texts[index][:60].decode(errors='replace')!r}; use --tokenizer-backend library"
                )
        return found

    return encode


def gigatoken_encoder(tokenizer: Any) -> Encoder | str:
    """gigatoken for a Hugging Face tokenizer, or why there is none."""
    core, special = _rust_core(tokenizer)
    if core is None:
        return "the tokenizer is not a Hugging Face tokenizer with a tokenizer.json"
    try:
        import awkward
        import gigatoken
    except ImportError:
        return "it is not installed (pip install gigatoken)"
    before, after = _template(core) if special else ([], [])
    try:
        fast = gigatoken.Tokenizer.from_json(core.to_str())
    except Exception as error:  # a tokenizer.json with features that it lacks raises many types
        return f"it does not support this tokenizer ({error})"

    def encode(texts: list[bytes]) -> Ids:
        if not texts:
            return join([])
        rows = fast.encode_batch(texts, parallel=False)
        found = Ids(awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows)).astype(np.int64))
        return with_ends(found, before, after)

    return encode


def _template(core: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text, such as the beginning of sequence."""
    bare = core.encode("x", add_special_tokens=False).ids
    full = core.encode("x", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []  # something else, which the comparison with the tokenizer will find


def with_ends(found: Ids, before: list[int], after: list[int]) -> Ids:
    """Ids with the same few ids added before and after every text."""
    if not before and not after:
        return found
    lengths = found.lengths + len(before) + len(after)
    ends = np.cumsum(lengths)
    ids = np.empty(int(lengths.sum()), found.ids.dtype)
    own = np.ones(len(ids), bool)
    for place, value in enumerate(before):
        ids[ends - lengths + place] = value
        own[ends - lengths + place] = False
    for place, value in enumerate(reversed(after), 1):
        ids[ends - place] = value
        own[ends - place] = False
    ids[own] = found.ids
    return Ids(ids, lengths)


def _rust_core(tokenizer: Any) -> tuple[Any, bool]:
    """(Rust tokenizer behind a Hugging Face one, or None; whether it adds special tokens)."""
    from megatron.core.tokenizers.text.libraries import HuggingFaceTokenizer

    wrapper = getattr(tokenizer, "_tokenizer", None)
    core = getattr(getattr(wrapper, "tokenizer", None), "backend_tokenizer", None)
    if core is None or not isinstance(wrapper, HuggingFaceTokenizer):
        return None, False
    # A tokenizer.json may store the truncation of its last use; transformers resets it in each call, the core does not.
    core.no_truncation()
    core.no_padding()
    return core, wrapper.include_special_tokens


def library_encoder(tokenizer: Any) -> tuple[str, Encoder]:
    """What the tokenizer's own library does for a batch, and the library's name."""
    from megatron.core.tokenizers.text import libraries

    wrapper = getattr(tokenizer, "_tokenizer", None)
    core, special = _rust_core(tokenizer)
    if core is not None:
        return "tokenizers", _hugging_face(core, special)
    if isinstance(wrapper, libraries.TikTokenTokenizer):
        coding = wrapper.tokenizer
        return "tiktoken", lambda texts: join(
            [coding.encode_to_numpy(text.decode(), allowed_special="all") for text in texts]
        )
    if isinstance(wrapper, libraries.SentencePieceTokenizer) and not wrapper.legacy:
        processor = wrapper.tokenizer
        if wrapper.ignore_extra_whitespaces or not wrapper.removed_extra_spaces:
            return "sentencepiece", lambda texts: join(
                processor.encode([text.decode() for text in texts], out_type=int, num_threads=1)
            )
    return "one by one", lambda texts: join([list(tokenizer.tokenize(text.decode())) for text in texts])


def _hugging_face(core: Any, special: bool) -> Encoder:
    before, after = _template(core) if special else ([], [])
    # Where the ends of a text are not simply added, a long one has to be encoded at once.
    longest = WINDOW if len(before) + len(after) == core.num_special_tokens_to_add(False) * special else None

    @functools.cache
    def plain() -> Any:
        copy = type(core).from_str(core.to_str())
        copy.post_processor = None
        copy.encode_special_tokens = core.encode_special_tokens
        return copy

    def encode(texts: list[bytes]) -> Ids:
        strings = [text.decode() for text in texts]
        long = {index for index, text in enumerate(strings) if longest is not None and len(text) > longest}
        short = [text for index, text in enumerate(strings) if index not in long]
        coded = iter(core.encode_batch_fast(short, add_special_tokens=special))
        if not long:
            return join([text.ids for text in coded])
        parts = []
        for index, text in enumerate(strings):
            if index in long:
                parts.append(with_ends(join([encode_in_windows(plain(), text)]), before, after).ids)
            else:
                parts.append(np.array(next(coded).ids, np.int64))
        return join(parts)

    return encode
