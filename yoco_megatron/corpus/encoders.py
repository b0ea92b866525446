"""Token ids of many texts at once, each exactly as the tokenizer gives them text by text.

    encode(texts) -> Ids: all ids in one array, and how many belong to each text

What a tokenizer's template puts around a text (a beginning token, an end) is kept apart, because it belongs around a
document, which may be encoded in several parts.

Backends, the fastest first: gigatoken (for byte-level BPE and SentencePiece-like tokenizer.json files), then what the
tokenizer's own library does for a batch. None of them holds Python's lock for long, so threads can share an encoder.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from yoco_megatron.corpus.long_texts import WINDOW, encode_in_windows
from yoco_megatron.data.tokenizer import hugging_face_wrapper, template_ids

BACKENDS = ("auto", "gigatoken", "library")
# What tokenizers disagree about: spaces, controls, marks that normalizers join, other scripts, digits, contractions.
HARD_TEXTS = (
    "  two  spaces ", "\n\n \t x\r\n", "\x00\x7f\u200d\ufeff", "cafe\u0301 Ⅷ ﬁ", "größer 漢字 🙂👩‍👩‍👧 हिन्दी",
    "1234567.89", "I'LL we've ’s", "a" * 1000, " " * 300, "naïve_snake CamelCase\\n", "x" + "\u0301" * 40, "",
)  # fmt: skip
# What a text is put after to encode it as one that follows another, and texts that show whether that matters.
ANCHOR, FOLLOWING = b"\n", (b"x", "\u044f".encode(), "\u6f22".encode())
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


class TextError(ValueError):
    """A text that the tokenizer cannot encode, such as a word for NullTokenizer, which reads numbers."""


Encoder = Callable[[list[bytes]], Ids]


def join(parts: list[Any]) -> Ids:
    """Ids of texts given one by one, as lists or arrays."""
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    if parts and isinstance(parts[0], np.ndarray):
        return Ids(np.concatenate(parts), lengths)
    return Ids(np.fromiter(chain.from_iterable(parts), np.int64, int(lengths.sum())), lengths)


@dataclass(frozen=True)
class TextEncoder:
    """`encode` gives the ids of texts alone; the template has `prefix` before and `suffix` after each text."""

    backend: str
    """The library that encodes."""
    encode: Encoder
    prefix: list[int]
    suffix: list[int]


def choose_encoder(tokenizer: Any, backend: str = "auto", split_special_tokens: bool = False) -> TextEncoder:
    """The encoder for a tokenizer that Megatron built.

    Args:
        backend: 'gigatoken', 'library', or 'auto': gigatoken where it is installed and knows the tokenizer.
        split_special_tokens: encode text that spells a special token as any other text.
    Raises:
        ValueError: gigatoken is requested but unavailable for this tokenizer; the tokenizer reads no text, or its
            template does more than to put special tokens around a text.
    """
    prefix, suffix = _template(tokenizer)
    name, library = library_encoder(tokenizer, split_special_tokens)
    if backend == "library":
        return TextEncoder(name, library, prefix, suffix)
    fast = gigatoken_encoder(tokenizer, split_special_tokens)
    problem = fast if isinstance(fast, str) else _disagreement(fast, library, _hard_texts(tokenizer))
    if problem is None:
        assert not isinstance(fast, str)
        return TextEncoder("gigatoken", compared(fast, library), prefix, suffix)
    if backend == "gigatoken":
        raise ValueError(f"--tokenizer-backend gigatoken: {problem}; remove the flag to use {name}")
    return TextEncoder(name, library, prefix, suffix)


def _hard_texts(tokenizer: Any) -> list[bytes]:
    core = _rust_core(tokenizer)
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


def gigatoken_encoder(tokenizer: Any, split_special_tokens: bool = False) -> Encoder | str:
    """gigatoken for a Hugging Face tokenizer, or why there is none."""
    core = _rust_core(tokenizer)
    if core is None:
        return "the tokenizer is not a Hugging Face tokenizer with a tokenizer.json"
    try:
        import awkward
        import gigatoken
    except ImportError:
        return "it is not installed (pip install gigatoken)"
    content = json.loads(core.to_str())
    if split_special_tokens:
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    try:
        fast = gigatoken.Tokenizer.from_json(json.dumps(content))
    except Exception as error:  # a tokenizer.json with features that it lacks raises many types
        return f"it does not support this tokenizer ({error})"

    def encode(texts: list[bytes]) -> Ids:
        if not texts:
            return join([])
        rows = fast.encode_batch(texts, parallel=False)
        return Ids(awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows)).astype(np.int64))

    return encode


def _template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after every text, such as a beginning of sequence."""
    wrapper = hugging_face_wrapper(tokenizer)
    return template_ids(wrapper.tokenizer) if wrapper is not None and wrapper.include_special_tokens else ([], [])


def find_special(found: Ids, special: dict[int, str]) -> dict[int, list[str]]:
    """Index of a text -> the special tokens that its own ids hold, in order of appearance, each once."""
    places = np.flatnonzero(np.isin(found.ids, np.fromiter(special, np.int64, len(special))))
    owners = np.searchsorted(np.cumsum(found.lengths), places, side="right")
    tokens: dict[int, dict[str, None]] = {}
    for owner, id_ in zip(owners.tolist(), found.ids[places].tolist()):
        tokens.setdefault(owner, {})[f"{special[id_]!r} ({id_})"] = None
    return {owner: list(names) for owner, names in tokens.items()}


def with_ends(found: Ids, before: Sequence[int | np.ndarray], after: Sequence[int | np.ndarray]) -> Ids:
    """Ids with a few added before and after every text: the same for all, or arrays with one a text."""
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


def following(encode: Encoder) -> Encoder:
    """An encoder for texts that follow others; `encode` itself unless it puts a space before every text."""
    try:
        newline, *alone = (encode([text]).ids for text in (ANCHOR, *FOLLOWING))
        together = [encode([ANCHOR + text]).ids for text in FOLLOWING]
    except TextError:  # its texts are ids
        return encode
    if all(np.array_equal(np.concatenate([newline, ids]), both) for ids, both in zip(alone, together)):
        return encode

    def encode_after_newline(texts: list[bytes]) -> Ids:
        found = encode([ANCHOR + text for text in texts])
        ends = np.cumsum(found.lengths).tolist()
        parts = []
        for text, start, end in zip(texts, [0, *ends], ends):
            ids = found.ids[start:end]
            begins = np.array_equal(ids[: len(newline)], newline)
            parts.append(ids[len(newline) :] if begins else encode([text]).ids)
        return join(parts)

    return encode_after_newline


def _rust_core(tokenizer: Any) -> Any:
    """The Rust tokenizer behind a Hugging Face one, without what its last use left there; None if there is none."""
    core = getattr(getattr(hugging_face_wrapper(tokenizer), "tokenizer", None), "backend_tokenizer", None)
    if core is not None:
        # A tokenizer.json may store the truncation of its last use; transformers resets it in each call, the core not.
        core.no_truncation()
        core.no_padding()
    return core


def library_encoder(tokenizer: Any, split_special_tokens: bool = False) -> tuple[str, Encoder]:
    """What the tokenizer's own library does for a batch, and the library's name."""
    from megatron.core.tokenizers.text import libraries

    wrapper = getattr(tokenizer, "_tokenizer", None)
    core = _rust_core(tokenizer)
    if core is not None:
        return "tokenizers", _hugging_face(core, split_special_tokens)
    if (slow := hugging_face_wrapper(tokenizer)) is not None:
        more = {"add_special_tokens": False, "split_special_tokens": split_special_tokens}
        return "one by one", lambda texts: join([slow.tokenizer(text.decode(), **more)["input_ids"] for text in texts])
    if isinstance(wrapper, libraries.TikTokenTokenizer):
        coding = wrapper.tokenizer
        allowed: Any = {"disallowed_special": ()} if split_special_tokens else {"allowed_special": "all"}
        return "tiktoken", lambda texts: join([coding.encode_to_numpy(text.decode(), **allowed) for text in texts])
    if isinstance(wrapper, libraries.SentencePieceTokenizer):
        return _sentencepiece(wrapper, split_special_tokens)
    if split_special_tokens:
        raise ValueError(f"--split-special-tokens: {type(wrapper).__name__} reads ids, not text: remove the flag")
    return "one by one", lambda texts: join([_encode_one(tokenizer, text) for text in texts])


def _encode_one(tokenizer: Any, text: bytes) -> np.ndarray:
    try:
        return np.array(tokenizer.tokenize(text.decode()) if text else [], np.int64)
    except (ValueError, OverflowError) as error:
        raise TextError(f"cannot be encoded ({error})") from None


def _sentencepiece(wrapper: Any, split_special_tokens: bool) -> tuple[str, Encoder]:
    if not wrapper.legacy and (wrapper.ignore_extra_whitespaces or not wrapper.removed_extra_spaces):
        processor = wrapper.tokenizer  # which never takes text for a control symbol
        return "sentencepiece", lambda texts: join(
            processor.encode([text.decode() for text in texts], out_type=int, num_threads=1)
        )
    if split_special_tokens:  # the wrapper itself looks for them
        wrapper = copy.copy(wrapper)
        wrapper.special_token_to_id = {}
    return "one by one", lambda texts: join([wrapper.text_to_ids(text.decode()) for text in texts])


def _hugging_face(core: Any, split_special_tokens: bool) -> Encoder:
    core = type(core).from_str(core.to_str())
    core.post_processor = None  # it adds the template, and moves offsets, by which long texts are cut
    core.encode_special_tokens = split_special_tokens

    def encode(texts: list[bytes]) -> Ids:
        strings = [text.decode() for text in texts]
        short = iter(
            core.encode_batch_fast([text for text in strings if len(text) <= WINDOW], add_special_tokens=False)
        )
        if all(len(text) <= WINDOW for text in strings):
            return join([coded.ids for coded in short])
        return join(
            [
                np.array(next(short).ids, np.int64) if len(text) <= WINDOW else encode_in_windows(core, text)
                for text in strings
            ]
        )

    return encode
