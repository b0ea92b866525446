"""Checks and statistics of Megatron's indexed datasets, before a run depends on them.

A truncated copy shows up in Megatron as wrong tokens or an error on some rank, hours in.
"""

import functools
import os
import re
import struct
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from yoco_megatron.data.blend import read_blends, shares
from yoco_megatron.data.idx import IndexContent, check_index, holds_tokens, read_header
from yoco_megatron.data.token_sample import sample_tokens
from yoco_megatron.utils.small_files import read_json

# Tokens counted at a time, so that a dataset need not fit into memory.
BLOCK_TOKENS = 1 << 22
# More ids are counted of no vocabulary: a damaged .bin may hold any number.
MAX_VOCABULARY = 1 << 24
# Datasets that are looked at together: each waits for its disk.
THREADS = 8


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


class _Sampled(_File, total=False):
    sampled_sha256: str


class _Bin(TypedDict):
    bin: _Sampled


class _Files(_Bin, total=False):
    idx: _File


class _Tokenizer(TypedDict, total=False):
    sha256: str | None
    vocab_size: int
    eod: int | None


class _LossMask(TypedDict, total=False):
    files: _Files


class _Report(TypedDict, total=False):
    files: _Files | None
    loss_mask: _LossMask | None
    tokenizer: _Tokenizer | None
    documents: int
    tokens: int
    max_id: int


def read_report(prefix: str) -> dict[str, Any]:
    """The report that preprocessing wrote beside a dataset; {} if there is none.

    Raises:
        ValueError: a file that is damaged or not such a report.
    """
    fix = "it is no report of tools/preprocess_data.py; copy it again, or remove it to continue without checksums"
    return read_json(Path(f"{prefix}.json"), _Report, missing={}, fix=fix)


def check_data_prefixes(prefixes: list[str], flag: str = "--data-path", inside: bool = True) -> None:
    """Check that each dataset exists, is whole and is the one that its report describes.

    Args:
        flag: the one that named them.
        inside: read every .idx in full, and a sample of every .bin. False: only headers and sizes, as the other ranks
            of a run do.
    Raises:
        ValueError: all missing or damaged datasets, each with its fix.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(functools.partial(_problem, inside=inside), prefixes))
    problems = [problem for problem in found if problem is not None]
    if problems:
        raise ValueError(f"{flag}: " + "\n  ".join(problems))


def index_of(prefix: str) -> IndexContent:
    """What the .idx of a dataset holds, checked, once for the same files. Raises ValueError."""
    states = [os.stat(f"{prefix}.{suffix}") for suffix in ("idx", "bin")]
    return _index_of(prefix, tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states))


@functools.cache
def _index_of(prefix: str, _: tuple[tuple[int, ...], ...]) -> IndexContent:
    return check_index(Path(f"{prefix}.idx"), Path(f"{prefix}.bin"))


def check_split(prefixes: list[str], split: str) -> None:
    """Check that each part with a share in --split has a token of each dataset; Megatron would loop forever.

    Raises:
        ValueError: the first empty part, or a --split that cannot be parsed.
    """
    from megatron.core.datasets.utils import Split

    for prefix in prefixes:
        idx = Path(f"{prefix}.idx")
        sequences = read_header(idx).sequences
        for part, share in zip(Split, shares(split)):
            first, end = sequences_of(sequences, split, part.name)
            if share > 0 and not holds_tokens(idx, first, end):
                raise ValueError(
                    f"--split {split}: none of the {sequences:,} documents of {prefix} is in the part {part.name}, or "
                    "only empty ones; give it a larger share, or 0"
                )


def _problem(prefix: str, inside: bool) -> str | None:
    idx, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, binary):
        if not path.is_file():
            return f"{path} is missing; {_advice(prefix)}"
    try:
        if inside:
            check_files(prefix, index_of(prefix), read_report(prefix).get("files"), f"{prefix}.json")
        else:
            check_size(idx, binary)
    except ValueError as error:
        return str(error)
    return None


def check_files(prefix: str, content: IndexContent, recorded: _Files | None, report: str) -> None:
    """Compare .bin and .idx with what a report says of them.

    Raises:
        ValueError: it is that of other files, such as the ones before an --overwrite.
    """
    files: Any = recorded or {}
    sampled = sample_tokens(Path(f"{prefix}.bin"), content.header.dtype).sha256
    for suffix, name, value in (("idx", "sha256", content.sha256), ("bin", "sampled_sha256", sampled)):
        wanted = files.get(suffix, {}).get(name, value)
        if wanted != value:
            raise ValueError(
                f"{report} describes another {prefix}.{suffix} ({name} {wanted}, not {value}); copy .bin, .idx "
                "and .json again, or remove the .json to continue without checksums"
            )


def check_size(idx: Path, binary: Path) -> None:
    """That the .bin ends where its last document ends. Raises ValueError."""
    header = read_header(idx)
    with idx.open("rb") as stream:
        stream.seek(header.pointers_at - 4)
        (length,) = struct.unpack("<i", stream.read(4))
        stream.seek(header.documents_at - 8)
        (pointer,) = struct.unpack("<q", stream.read(8))
    size, expected = binary.stat().st_size, pointer + length * header.dtype.itemsize
    if size != expected:
        state = "shorter" if size < expected else "longer"
        raise ValueError(f"{binary} is {state} than its .idx says ({size:,} bytes, not {expected:,}); copy both again")


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


def count_documents(prefix: str) -> tuple[int, int]:
    """Documents and tokens of the indexed dataset `prefix`."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    return len(dataset.document_indices) - 1, int(dataset.sequence_lengths.sum(dtype=np.int64))


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy of token frequencies, in nats a token: the loss of the best model that ignores all context.

    A validation loss well below it shows that the model uses context; one above it, that it has not learned yet.
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum()) or 0.0  # never -0.0


def count_ids(
    prefix: str, split: str | None = None, part: str | None = None, limit: int = MAX_VOCABULARY
) -> np.ndarray:
    """How often each token id is in a dataset, int64 [1 + largest id].

    Args:
        prefix: an indexed dataset.
        split: Megatron's --split, such as "95,4,1".
        part: train, valid or test; None (with split None) for the whole dataset.
        limit: ids of the vocabulary are below it.
    Raises:
        ValueError: an unknown part, one that holds no tokens, an id that the vocabulary lacks.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path

    from yoco_megatron.utils.progress import progress  # imports tqdm, which training does not need

    dataset = IndexedDataset(prefix)
    first, end = sequences_of(len(dataset), split, part)
    lengths = dataset.sequence_lengths[first:end]
    total = remaining = int(lengths.sum(dtype=np.int64))
    if remaining == 0:
        raise ValueError(f"--split {split}: the part {part} of {prefix} holds no tokens; give it a larger share")
    dtype = np.dtype(dataset.index.dtype)
    counts = np.zeros(0, dtype=np.int64)
    with (
        open(get_bin_path(prefix), "rb") as stream,
        progress(total=remaining, desc="count tokens", unit="token", unit_scale=True) as bar,
    ):
        stream.seek(int(dataset.index.sequence_pointers[first]))
        while remaining:
            block = np.fromfile(stream, dtype=dtype, count=min(remaining, BLOCK_TOKENS))
            assert block.size, "shorter .bin than .idx: check_data_prefixes was not called"
            if block.min() < 0 or block.max() >= limit:
                place = int(np.argmax((block < 0) | (block >= limit)))
                at = np.cumsum(lengths, dtype=np.int64).searchsorted(total - remaining + place, "right")
                raise ValueError(
                    f"--data-path {prefix}: document {first + at:,} holds the token id {block[place]}, and the "
                    f"vocabulary ends at {limit - 1:,}: give the tokenizer that made the data"
                )
            own = np.bincount(block, minlength=counts.size)
            own[: counts.size] += counts
            counts = own
            remaining -= block.size
            bar.update(block.size)
    return counts


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
