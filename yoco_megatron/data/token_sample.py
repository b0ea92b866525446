"""A sample of a .bin, which tells other tokens from these, and ids that a vocabulary lacks, without reading terabytes.

Evenly spaced blocks: small files are read whole. What changes a few tokens between the blocks stays unnoticed here;
tools/inspect_dataset.py --verify reads all, and training looks at the ids of each sample that it reads.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCKS = 64
BLOCK_BYTES = 1 << 15
# Of a whole file at a time.
READ_BYTES = 1 << 20
# Of every dtype's tokens a block holds whole ones.
ALIGNMENT = 8


@dataclass(frozen=True)
class TokenSample:
    """sha256: of the sampled bytes, in hex; smallest and largest: token ids among them."""

    sha256: str
    smallest: int
    largest: int


def sample_tokens(binary: Path, dtype: np.dtype, whole: int = 0) -> TokenSample:
    """The sample of a .bin, whose size is a multiple of the dtype's. Raises OSError.

    whole: files of up to so many bytes are read whole, as those that are no larger than the sample.
    """
    size = binary.stat().st_size
    starts: Sequence[int] = range(0, size, READ_BYTES)
    length = READ_BYTES
    if size > max(whole, BLOCKS * BLOCK_BYTES):
        places = ((size - BLOCK_BYTES) * block // (BLOCKS - 1) for block in range(BLOCKS))
        starts, length = [place // ALIGNMENT * ALIGNMENT for place in places], BLOCK_BYTES
    digest, smallest, largest = hashlib.sha256(), 0, 0
    with binary.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            tokens = np.frombuffer(stream.read(length), dtype)
            digest.update(tokens.tobytes())
            if tokens.size:
                smallest, largest = min(smallest, int(tokens.min())), max(largest, int(tokens.max()))
    return TokenSample(digest.hexdigest(), smallest, largest)
