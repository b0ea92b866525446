"""Records of a batch become documents: token ids, and of prompts and answers which of them are learned.

    Batch -> Records.read -> Document (segments of text) -> DocumentEncoder.encode -> Encoded

A plain text is one segment, all of it learned. Prompts and answers are segments of their own, each encoded by itself:
a model that answers reads the tokens of the prompt alone.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from yoco_megatron.corpus.encoders import Encoder, Ids, TextError, find_special, join, with_ends
from yoco_megatron.corpus.readers import Batch, Parsed

# Characters of a reason in the list; a record may name thousands of keys.
REASON_LENGTH = 300
# Longest document that an .idx can hold.
MAX_TOKENS = np.iinfo(np.int32).max


class Segment(NamedTuple):
    """A part of a document that is encoded by itself, UTF-8."""

    text: bytes
    is_learned: bool = True


class Document(NamedTuple):
    """`special`: special tokens that its author spelled. None: all that its ids hold, as no template writes any."""

    segments: list[Segment]
    special: list[str] | None = None


class Records(Protocol):
    """A kind of records: how they are read, and the datasets that are made of them."""

    kind: str
    names: list[str]
    """Of the datasets, which hold a document of each record."""
    keys: list[str]
    """What a record must have."""
    columns: list[str]
    """All that is read of a record."""
    is_masked: bool
    """Whether some tokens are not learned."""
    nothing: str
    """What is wrong with a record that makes no document, because it has nothing to learn."""

    def read(self, batch: Batch) -> Parsed[list[Document]]:
        """The documents of each good record, one a dataset."""
        ...


class Texts:
    """Plain texts; each of a record's keys makes a dataset."""

    kind, is_masked, nothing = "text", False, "is empty or gives no token"

    def __init__(self, keys: list[str]) -> None:
        self.keys = self.columns = self.names = keys

    def read(self, batch: Batch) -> Parsed[list[Document]]:
        """Documents of one segment."""
        texts, indices, bad = batch.texts(self.keys)
        return Parsed([[Document([Segment(text)]) for text in row] for row in texts], indices, bad)


@dataclass
class Problem:
    """A suspicious record: 'bad' (skipped), 'empty' (no document) or 'kept' (used as it is)."""

    place: str
    reason: str
    kind: str


def printable(text: str) -> str:
    """`text` with everything that is not Unicode (file names in other encodings, lone surrogates) escaped."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Ends:
    """The ids before and after each document, and the special tokens (id -> text) that should be nowhere else."""

    prefix: list[int] = field(default_factory=list)
    suffix: list[int] = field(default_factory=list)
    special: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """ids: integers [tokens]; lengths: int64 [documents]; learned: uint8 [tokens], 1 or 0, or None if all are."""

    ids: np.ndarray
    lengths: np.ndarray
    learned: np.ndarray | None

    def without(self, places: list[int]) -> "Tokens":
        """All but these documents."""
        if not places:
            return self
        kept = np.ones(len(self.lengths), bool)
        kept[places] = False
        tokens = np.repeat(kept, self.lengths)
        return Tokens(self.ids[tokens], self.lengths[kept], None if self.learned is None else self.learned[tokens])


@dataclass
class Encoded:
    """The documents of a batch by dataset, in order, without empty ones; counts and problems of the batch."""

    tokens: dict[str, Tokens]
    text_bytes: dict[str, int]
    empty: dict[str, int]
    nul: dict[str, int]
    special: dict[str, int]
    bad: int
    problems: list[Problem]


@dataclass(frozen=True)
class DocumentEncoder:
    """Encodes batches, in any thread.

    Args:
        records: the kind of records.
        encode: for the first segment of a document.
        encode_more: for the segments after it.
        dtype: of the ids in the dataset.
        limit: ids from here on are not in the vocabulary; a text that gives one is bad.
        ends: of each document.
    """

    records: Records
    encode: Encoder
    encode_more: Encoder
    dtype: type[np.integer]
    limit: int
    ends: Ends

    def encode_batch(self, batch: Batch) -> Encoded:
        """Read and encode one batch; a record that is bad for one dataset is left out for all.

        Raises:
            ValueError: a document longer than an index can hold.
        """
        names = self.records.names
        rows, indices, bad = self.records.read(batch)
        documents = {name: [row[column] for row in rows] for column, name in enumerate(names)}
        whole: dict[str, tuple[Tokens, np.ndarray]] = {}
        wrong: dict[int, str] = {}
        for name in names:
            tokens, learned, reasons = self._encode(documents[name])
            whole[name] = tokens, learned
            wrong |= {row: f"the text under {name!r} {reason}" for row, reason in reasons.items()}
        good = [row for row in range(len(rows)) if row not in wrong]
        bad += [(indices[row], reason) for row, reason in wrong.items()]
        odd = [(index, reason, "bad") for index, reason in bad]
        encoded = Encoded({}, {}, {}, {}, {}, len(bad), [])
        for name in names:
            used = [documents[name][row] for row in good]
            tokens, learned = whole[name]
            found = tokens.without(list(wrong))
            nul = [place for place, (parts, _) in enumerate(used) if any(b"\0" in part.text for part in parts)]
            empty = np.flatnonzero(learned[good] == 0).tolist()
            special = _special(used, found, self.ends.special)
            found = self._with_ends(found.without(empty))
            if (found.lengths > MAX_TOKENS).any():
                raise ValueError(
                    f"--input {batch.path}: a document of {found.lengths.max():,} tokens at or after {batch.place(0)}; "
                    f"an index counts up to {MAX_TOKENS:,}: cut it"
                )
            encoded.tokens[name] = found
            encoded.text_bytes[name] = sum(len(part.text) for parts, _ in used for part in parts)
            encoded.empty[name], encoded.nul[name], encoded.special[name] = len(empty), len(nul), len(special)
            odd += [(indices[good[place]], f"{name!r} {self.records.nothing}", "empty") for place in empty]
            odd += [(indices[good[place]], f"{name!r} holds NUL characters", "kept") for place in nul]
            odd += [
                (indices[good[place]], f"{name!r} holds special tokens: {', '.join(spelled)}", "kept")
                for place, spelled in special.items()
            ]
        odd.sort(key=lambda entry: entry[0])  # so that the list does not depend on batch boundaries
        encoded.problems = [
            Problem(printable(batch.place(index)), printable(why)[:REASON_LENGTH], kind) for index, why, kind in odd
        ]
        return encoded

    def _encode(self, documents: list[Document]) -> tuple[Tokens, np.ndarray, dict[int, str]]:
        """All documents, learned tokens of each, and why some of these are bad, by their places."""
        counts = np.fromiter((len(document.segments) for document in documents), np.int64, len(documents))
        segments = [segment for document in documents for segment in document.segments]
        texts = [segment.text for segment in segments]
        if self.encode_more is self.encode:
            found, wrong = _encode(texts, self.encode)
        else:
            is_first = np.zeros(len(texts), bool)
            is_first[(np.cumsum(counts) - counts)[counts > 0]] = True
            found, wrong = _encode_both(texts, is_first, self.encode, self.encode_more)
        owners = np.repeat(np.arange(len(documents)), counts)
        reasons = {int(owners[place]): reason for place, reason in reversed(wrong.items())}
        lengths = _sums(found.lengths, counts)
        if found.ids.size and (found.ids.max() >= self.limit or found.ids.min() < 0):
            outside = (found.ids >= self.limit) | (found.ids < 0)
            of_tokens = np.repeat(np.arange(len(documents)), lengths)
            for place, number in zip(of_tokens[outside].tolist(), found.ids[outside].tolist()):
                reasons.setdefault(
                    place, f"gives the token id {number}, and those of the vocabulary end at {self.limit - 1}"
                )
        # What a tokenizer makes of no text is nothing to learn.
        flags = np.fromiter((part.is_learned and bool(part.text) for part in segments), np.uint8, len(segments))
        learned = np.repeat(flags, found.lengths) if self.records.is_masked else None
        tokens = Tokens(found.ids.astype(self.dtype), lengths, learned)
        return tokens, _sums(found.lengths * flags, counts), reasons

    def _with_ends(self, found: Tokens) -> Tokens:
        """Documents with their ends; what follows the last token is learned where that one is."""
        prefix, suffix = self.ends.prefix, self.ends.suffix
        ids, lengths, learned = found.ids, found.lengths, found.learned
        if learned is None:
            whole = with_ends(Ids(ids, lengths), prefix, suffix)
            return Tokens(whole.ids, whole.lengths, None)
        last = np.cumsum(lengths) - 1
        flags = learned[last]
        if suffix:  # the text or its template may have written the end
            own = np.ones(len(ids), bool)
            own[last] = ids[last] != suffix[-1]
            ids, lengths, learned = ids[own], lengths - ~own[last], learned[own]
        whole = with_ends(Ids(ids, lengths), prefix, suffix)
        learned = with_ends(Ids(learned, lengths), [0] * len(prefix), [flags] * len(suffix)).ids
        learned[np.cumsum(whole.lengths) - whole.lengths] = 0  # nothing predicts the first token
        return Tokens(whole.ids, whole.lengths, learned)


def _encode(texts: list[bytes], encode: Encoder) -> tuple[Ids, dict[int, str]]:
    """The ids of all texts, and why some of these texts are bad, by their places."""
    try:
        return encode(texts), {}
    except TextError:  # of one of them
        reasons: dict[int, str] = {}
        parts = []
        for place, text in enumerate(texts):
            try:
                parts.append(encode([text]).ids)
            except TextError as error:
                reasons[place] = str(error)
                parts.append(np.empty(0, np.int64))
        return join(parts), reasons


def _encode_both(
    texts: list[bytes], is_first: np.ndarray, encode: Encoder, encode_more: Encoder
) -> tuple[Ids, dict[int, str]]:
    """As `_encode`, by `encode` where `is_first`, else by `encode_more`."""
    parts: list[np.ndarray] = [np.empty(0, np.int64)] * len(texts)
    reasons: dict[int, str] = {}
    for wanted, using in ((True, encode), (False, encode_more)):
        places = np.flatnonzero(is_first == wanted).tolist()
        found, wrong = _encode([texts[place] for place in places], using)
        for place, ids in zip(places, np.split(found.ids, np.cumsum(found.lengths)[:-1])):
            parts[place] = ids
        reasons |= {places[place]: reason for place, reason in wrong.items()}
    return join(parts), dict(sorted(reasons.items()))


def _special(documents: list[Document], found: Tokens, special: dict[int, str]) -> dict[int, list[str]]:
    """Place of a document -> the special tokens that its author spelled."""
    by_ids = find_special(Ids(found.ids, found.lengths), special)
    spelled = ((place, document.special) for place, document in enumerate(documents))
    return {place: own or by_ids[place] for place, own in spelled if own or (own is None and place in by_ids)}


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of `counts` values each, in a row, int64."""
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.concatenate([[0], np.cumsum(counts)])
    return np.diff(sums[ends])
