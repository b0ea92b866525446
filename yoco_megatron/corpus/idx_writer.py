"""Writes the .idx of an indexed dataset from document lengths, which need not fit into memory.

megatron.core's IndexedDatasetBuilder keeps Python lists (about 100 bytes a document) and counts in a Python loop; this
writes the same bytes block by block, in constant memory. The layout is in yoco_megatron/data/idx.py.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from yoco_megatron.data.idx import HEADER, MAGIC

BLOCK = 1 << 20


def write_index(path: Path, lengths: np.ndarray, dtype: type[np.integer]) -> None:
    """Write an .idx in which each document is one sequence, and sync it to disk.

    Args:
        lengths: int32 [documents], tokens of each; may be a memory map.
        dtype: of the tokens in the .bin.
    """
    from megatron.core.datasets.indexed_dataset import DType

    count = len(lengths)
    size = DType.size(dtype)
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, DType.code_from_dtype(dtype), count, count + 1))
        for start in range(0, count, BLOCK):
            _write(stream, lengths[start : start + BLOCK], "<i4")
        end = 0  # of the sequences so far, in bytes
        for start in range(0, count, BLOCK):
            ends = end + np.cumsum(lengths[start : start + BLOCK], dtype=np.int64) * size
            _write(stream, np.concatenate([[end], ends[:-1]]), "<i8")
            end = int(ends[-1])
        for start in range(0, count + 1, BLOCK):
            _write(stream, np.arange(start, min(start + BLOCK, count + 1)), "<i8")
        sync(stream)


def _write(stream: BinaryIO, values: np.ndarray, dtype: str) -> None:
    stream.write(values.astype(dtype, copy=False).tobytes())


def sync(stream: Any) -> None:
    """Flush an open file and wait until it is on disk."""
    stream.flush()
    os.fsync(stream.fileno())
