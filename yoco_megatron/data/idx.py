"""The .idx of Megatron's indexed datasets: its layout, and a check of all that is in it.

    .idx   9 B magic | u64 version | u8 dtype code | u64 sequences S | u64 document indices D
           | int32 length[S] | int64 byte pointer[S] | int64 document index[D]  (| int8 mode[S] if multimodal)
    .bin   the tokens of all sequences in order, without gaps

Megatron believes every number: a negative length lets it build an index for ever, and a wrong pointer makes it train on
tokens that are not there. One document is one sequence here, as GPTDataset treats each sequence as a document.
"""

import hashlib
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Documents that are checked at a time, so that an index need not fit into memory.
BLOCK_DOCUMENTS = 1 << 20
# GPTDataset numbers documents in int32.
MAX_DOCUMENTS = 2**31 - 1
COPY_AGAIN = "; copy or preprocess it again"


@dataclass(frozen=True)
class Header:
    """dtype: of the tokens; sequences and document_indices: the numbers S and D of entries."""

    dtype: np.dtype
    sequences: int
    document_indices: int

    @property
    def pointers_at(self) -> int:
        """Byte at which the pointers begin; the lengths follow the header."""
        return HEADER.size + 4 * self.sequences

    @property
    def documents_at(self) -> int:
        """Byte at which the document indices begin."""
        return self.pointers_at + 8 * self.sequences


@dataclass(frozen=True)
class IndexContent:
    """tokens: of all documents; longest: tokens of the longest one; sha256: of the .idx, in hex."""

    header: Header
    tokens: int
    longest: int
    sha256: str


def read_header(path: Path) -> Header:
    """The header of an .idx, after a check of it and of the file's size; reads 34 bytes.

    Raises:
        ValueError: not the index of a dataset of documents, or not a whole one.
    """
    from megatron.core.datasets.indexed_dataset import DType

    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(HEADER.size)
    if not start.startswith(MAGIC):
        raise ValueError(f"{path} is not the index of a Megatron indexed dataset{COPY_AGAIN}")
    if len(start) < HEADER.size:
        raise ValueError(f"{path} is truncated ({size} bytes, in the header){COPY_AGAIN}")
    _, version, code, sequences, document_indices = HEADER.unpack(start)
    known = {member.value: np.dtype(member.name) for member in DType}
    if version != 1 or code not in known:
        raise ValueError(f"{path} has the unknown version {version} or dtype code {code}{COPY_AGAIN}")
    if known[code].kind not in "iu":
        raise ValueError(f"{path} has tokens of {known[code].name}: token ids are integers{COPY_AGAIN}")
    text_size = HEADER.size + sequences * (4 + 8) + document_indices * 8
    if size not in (text_size, text_size + sequences):
        state = "truncated" if size < text_size else "longer than its header says"
        raise ValueError(f"{path} is {state} ({size:,} bytes, not {text_size:,}){COPY_AGAIN}")
    if sequences == 0:
        raise ValueError(f"{path} holds no documents{COPY_AGAIN}")
    if sequences > MAX_DOCUMENTS:
        raise ValueError(f"{path} has {sequences:,} documents, and Megatron counts up to {MAX_DOCUMENTS:,}: split it")
    # Empty documents have no sequence.
    if sequences > document_indices - 1:
        raise ValueError(_of_sentences(path, f"{sequences:,} in {max(document_indices - 1, 0):,} documents"))
    return Header(known[code], sequences, document_indices)


def holds_tokens(idx: Path, first: int, end: int) -> bool:
    """Whether one of the documents from `first` to before `end` is not empty."""
    with idx.open("rb") as stream:
        stream.seek(HEADER.size + 4 * first)
        while first < end:
            lengths = np.fromfile(stream, "<i4", min(BLOCK_DOCUMENTS, end - first))
            if lengths.any():
                return True
            first += BLOCK_DOCUMENTS
    return False


def check_index(idx: Path, binary: Path) -> IndexContent:
    """Check every length, pointer and document index of an .idx, in blocks, while its SHA-256 is computed.

    Raises:
        ValueError: the first number that is wrong, with the document's number and what it should be.
    """
    header = read_header(idx)
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(_sha256, idx)
        tokens, longest = _check_sequences(idx, header, binary, binary.stat().st_size)
        _check_documents(idx, header)
        return IndexContent(header, tokens, longest, digest.result())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_sequences(idx: Path, header: Header, binary: Path, bin_bytes: int) -> tuple[int, int]:
    """Lengths and pointers; returns the tokens in all, and of the longest document."""
    itemsize, end, longest = header.dtype.itemsize, 0, 0
    with idx.open("rb") as lengths_file, idx.open("rb") as pointers_file:
        lengths_file.seek(HEADER.size)
        pointers_file.seek(header.pointers_at)
        for first in range(0, header.sequences, BLOCK_DOCUMENTS):
            count = min(BLOCK_DOCUMENTS, header.sequences - first)
            lengths = np.fromfile(lengths_file, "<i4", count)
            pointers = np.fromfile(pointers_file, "<i8", count)
            if lengths.min() < 0:
                bad = int(np.argmax(lengths < 0))
                raise ValueError(f"{idx}: document {first + bad:,} has the length {lengths[bad]}{COPY_AGAIN}")
            ends = np.cumsum(lengths, dtype=np.int64)
            ends *= itemsize
            ends += end
            starts = np.concatenate([[end], ends[:-1]])
            if not np.array_equal(pointers, starts):
                bad = int(np.argmax(pointers != starts))
                raise ValueError(
                    f"{idx}: document {first + bad:,} begins at byte {pointers[bad]:,} of the .bin, and not at "
                    f"{starts[bad]:,}, where the one before it ends{COPY_AGAIN}"
                )
            end, longest = int(ends[-1]), max(longest, int(lengths.max()))
            if end > bin_bytes:
                break
    if end != bin_bytes:
        state = "shorter" if bin_bytes < end else "longer"
        raise ValueError(f"{binary} is {state} than its .idx says ({bin_bytes:,} bytes, not {end:,}); copy both again")
    return end // itemsize, longest


def _check_documents(idx: Path, header: Header) -> None:
    """The document indices rise from 0 to the number of sequences, by at most 1."""
    last = 0
    with idx.open("rb") as stream:
        stream.seek(header.documents_at)
        for first in range(0, header.document_indices, BLOCK_DOCUMENTS):
            count = min(BLOCK_DOCUMENTS, header.document_indices - first)
            indices = np.fromfile(stream, "<i8", count)
            steps = np.diff(indices, prepend=last)
            wrong = (steps < 0) | (indices < 0) | (indices > header.sequences)
            wrong[0] |= first == 0 and indices[0] != 0
            if wrong.any():
                bad = int(np.argmax(wrong))
                raise ValueError(
                    f"{idx}: document index {first + bad:,} is {indices[bad]:,}: they rise from 0 to the "
                    f"{header.sequences:,} documents{COPY_AGAIN}"
                )
            if steps.max() > 1:
                bad = int(np.argmax(steps > 1))
                raise ValueError(_of_sentences(idx, f"document {first + bad - 1:,} has {steps[bad]:,}"))
            last = int(indices[-1])
    if last != header.sequences:
        raise ValueError(f"{idx}: its document indices end at {last:,} of {header.sequences:,} documents{COPY_AGAIN}")


def _of_sentences(path: Path, what: str) -> str:
    return (
        f"{path} is an index of sentences ({what}), which training would shuffle; preprocess the text with "
        "tools/preprocess_data.py, whose --split-sentences keeps documents"
    )
