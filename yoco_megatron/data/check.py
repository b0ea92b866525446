"""Checks and statistics of Megatron's indexed datasets, before a run depends on them.

A truncated copy shows up in Megatron as wrong tokens or an error on some rank, hours in. File sizes reveal it:

    .idx   9 B magic | u64 version | u8 dtype code | u64 sequences S | u64 document indices D
           | int32 length[S] | int64 byte pointer[S] | int64 document index[D]  (| int8 mode[S] if multimodal)
    .bin   ends where its last sequence ends: pointer[S - 1] + length[S - 1] * item size
"""

import os
import re
import struct
from argparse import Namespace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from yoco_megatron.data.blend import read_blends, shares
from yoco_megatron.utils.small_files import read_json

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Tokens counted at a time, so that a dataset need not fit into memory.
BLOCK_TOKENS = 1 << 22


def data_prefixes_from_args(args: Namespace) -> list[str]:
    """All dataset prefixes in Megatron's data flags, each once, in order; [] for --mock-data or no flag.

    Raises:
        ValueError: see `blend.read_blends`.
    """
    if getattr(args, "mock_data", False):
        return []
    blend, blend_per_split = read_blends(args)
    prefixes = [prefix for part in [blend, *(blend_per_split or [])] if part is not None for prefix in part[0]]
    return list(dict.fromkeys(prefixes))


class _File(TypedDict):
    sha256: str


class _Bin(TypedDict):
    bin: _File


class _Files(_Bin, total=False):
    idx: _File


class _Tokenizer(TypedDict, total=False):
    sha256: str | None
    vocab_size: int
    eod: int | None


class _Report(TypedDict, total=False):
    files: _Files | None
    tokenizer: _Tokenizer | None
    documents: int
    tokens: int


def read_report(prefix: str) -> dict[str, Any]:
    """The report that preprocessing wrote beside a dataset; {} if there is none.

    Raises:
        ValueError: a file that is damaged or not such a report.
    """
    fix = "it is no report of tools/preprocess_data.py; copy it again, or remove it to continue without checksums"
    return read_json(Path(f"{prefix}.json"), _Report, missing={}, fix=fix)


def check_data_prefixes(prefixes: list[str], flag: str = "--data-path") -> None:
    """Check that each dataset exists and is whole. Reads 46 bytes of an .idx and the file sizes.

    Prefixes in object storage (s3://, msc://) are left to Megatron's own readers. `flag`: the one that named them.

    Raises:
        ValueError: all missing or damaged datasets, each with its fix.
    """
    found = [_problem(prefix) for prefix in prefixes if "://" not in prefix]
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise ValueError(f"{flag}: " + "\n  ".join(problems))


def check_split(prefixes: list[str], split: str) -> None:
    """Check that each part with a share in --split has a document of each dataset; Megatron would loop forever.

    Raises:
        ValueError: the first empty part, or a --split that cannot be parsed.
    """
    from megatron.core.datasets.utils import Split

    for prefix in prefixes:
        if "://" in prefix:
            continue
        with open(f"{prefix}.idx", "rb") as stream:
            sequences = HEADER.unpack(stream.read(HEADER.size))[3]
        for part, share in zip(Split, shares(split)):
            first, end = sequences_of(sequences, split, part.name)
            if share > 0 and first == end:
                raise ValueError(
                    f"--split {split}: none of the {sequences:,} documents of {prefix} is in the part {part.name}; "
                    "give it a larger share, or 0"
                )


def _problem(prefix: str) -> str | None:
    idx, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, binary):
        if not path.is_file():
            return f"{path} is missing; {_advice(prefix)}"
    expected = _expected_sizes(idx)
    if isinstance(expected, str):
        return f"{idx} {expected}" + ("" if "sentences" in expected else "; copy or preprocess it again")
    size = binary.stat().st_size
    if size != expected:
        state = "shorter" if size < expected else "longer"
        return f"{binary} is {state} than its .idx says ({size:,} bytes, not {expected:,}); copy both again"
    return None


def _advice(prefix: str) -> str:
    for suffix in (".idx", ".bin"):
        if prefix.endswith(suffix):
            return f"give the prefix without {suffix}"
    if re.fullmatch(r"[\d.]+", prefix):
        return f"{prefix} is not a prefix: give W1 P1 W2 P2 ... with a weight for each prefix, or prefixes alone"
    folder, name = os.path.split(prefix)
    near = sorted(Path(folder or ".").glob(f"{name}*.idx")) if name else []
    if near:
        return f"did you mean {' or '.join(str(path.with_suffix('')) for path in near[:3])}?"
    return "give PREFIX of the PREFIX.bin and PREFIX.idx that tools/preprocess_data.py wrote"


def _expected_sizes(idx: Path) -> int | str:
    """Bytes of the .bin that belongs to `idx`, or what is wrong with `idx`."""
    from megatron.core.datasets.indexed_dataset import DType

    size = idx.stat().st_size
    with idx.open("rb") as stream:
        header = stream.read(HEADER.size)
        if not header.startswith(MAGIC):
            return "is not the index of a Megatron indexed dataset"
        if len(header) < HEADER.size:
            return f"is truncated ({size} bytes, in the header)"
        _, version, code, sequences, document_indices = HEADER.unpack(header)
        if version != 1 or code not in {member.value for member in DType}:
            return f"has version {version} and dtype code {code}, which Megatron does not know"
        text_size = HEADER.size + sequences * (4 + 8) + document_indices * 8
        if size not in (text_size, text_size + sequences):
            state = "truncated" if size < text_size else "longer than its header says"
            return f"is {state} ({size:,} bytes, not {text_size:,})"
        if sequences == 0:
            return "holds no documents"
        # Empty documents have no sequence. Of more sequences than documents, GPTDataset would treat each as a document.
        if sequences > document_indices - 1:
            return (
                f"is an index of sentences ({sequences:,} in {document_indices - 1:,} documents), which training would "
                "shuffle; preprocess the text with tools/preprocess_data.py, whose --split-sentences keeps documents"
            )
        stream.seek(HEADER.size + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", stream.read(4))
        stream.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (pointer,) = struct.unpack("<q", stream.read(8))
    return pointer + length * DType.size(code)


def count_documents(prefix: str) -> tuple[int, int]:
    """Documents and tokens of the indexed dataset `prefix`."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return len(dataset.document_indices) - 1, int(dataset.sequence_lengths.sum(dtype=np.int64))


def count_tokens(prefix: str, split: str | None, part: str | None) -> int:
    """Tokens of a part of the indexed dataset `prefix`, of all of it where split and part are None."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    first, end = sequences_of(len(dataset), split, part)
    return int(dataset.sequence_lengths[first:end].sum(dtype=np.int64))


def unigram_entropy(prefix: str, split: str | None = None, part: str | None = None) -> float:
    """Entropy of the token frequencies, in nats a token: the loss of the best model that ignores all context.

    A validation loss well below it shows that the model uses context; one above it, that it has not learned yet.

    Args:
        prefix: an indexed dataset.
        split: Megatron's --split, such as "95,4,1".
        part: train, valid or test; None (with split None) for the whole dataset.
    Raises:
        ValueError: an unknown part, or one that holds no tokens.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path
    from tqdm import tqdm  # here, because training, which imports this module, does not need it

    dataset = IndexedDataset(prefix)
    first, end = sequences_of(len(dataset), split, part)
    lengths = dataset.sequence_lengths[first:end]
    remaining = int(lengths.sum(dtype=np.int64))
    if remaining == 0:
        raise ValueError(f"--split {split}: the part {part} of {prefix} holds no tokens; give it a larger share")
    dtype = np.dtype(dataset.index.dtype)
    counts = np.zeros(0, dtype=np.int64)
    with (
        open(get_bin_path(prefix), "rb") as stream,
        tqdm(total=remaining, desc="count tokens", unit="token", unit_scale=True, disable=None) as progress,
    ):
        stream.seek(int(dataset.index.sequence_pointers[first]))
        while remaining:
            block = np.fromfile(stream, dtype=dtype, count=min(remaining, BLOCK_TOKENS))
            assert block.size, "shorter .bin than .idx: check_data_prefixes was not called"
            own = np.bincount(block, minlength=counts.size)
            own[: counts.size] += counts
            counts = own
            remaining -= block.size
            progress.update(block.size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum()) or 0.0  # never -0.0


def sequences_of(sequences: int, split: str | None, part: str | None) -> tuple[int, int]:
    """First and end of the sequences in a part, cut as core/datasets/blended_megatron_dataset_builder.py does."""
    from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix
    from megatron.core.datasets.utils import Split

    if (split is None) != (part is None):
        raise ValueError("--split and --part go together: give both, or neither for the whole dataset")
    if split is None:
        return 0, sequences
    if part not in Split.__members__:
        raise ValueError(f"--part {part}: choose one of {', '.join(Split.__members__)}")
    bounds = convert_split_vector_to_split_matrix(shares(split))[Split[part].value]
    if bounds is None:
        return 0, 0
    return round(bounds[0] * sequences), round(bounds[1] * sequences)
