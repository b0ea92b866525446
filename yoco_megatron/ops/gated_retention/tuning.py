"""Pinned launch configurations of the retention kernels, and how many segments a sequence is cut into.

Nothing is tuned while training: Triton's choice would differ from run to run, and with it the rounding.
`benchmarks/tune_retention.py` measures the candidates and writes this table's file.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# Tokens a chunk: 64 is the M of Hopper's matrix instructions.
CHUNK = 64
TABLE = Path(__file__).with_name("tuning.json")
# Shorter segments cost more in states written and read than they gain.
MIN_SEGMENT_CHUNKS = 8


@dataclass(frozen=True)
class Config:
    """`columns` of z a program holds state for, and Triton's launch options."""

    columns: int
    num_warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return dict(num_warps=self.num_warps, STAGES=self.stages)

    def slices(self, width: int) -> int:
        return width // min(width, self.columns)


@cache
def _table() -> dict[str, dict[str, Config]]:
    return {
        kernel: {shape: Config(**entry) for shape, entry in entries.items()}
        for kernel, entries in json.loads(TABLE.read_text()).items()
    }


def config_for(kernel: str, width: int, dtype: torch.dtype) -> Config:
    """The pinned configuration of "forward", "backward" or "segment" for heads of `width`, the wider of K and V."""
    entries = _table()[kernel]
    return entries["float32"] if dtype == torch.float32 else entries["256" if width > 128 else "128"]


@cache
def num_segments(heads: int, chunks: int, programs: tuple[int, ...], multiprocessors: int) -> int:
    """Into how many segments to cut a sequence of `chunks`, so that programs fill the GPU.

    `programs` run per head and segment in each launch (forward, backward). One runs on a multiprocessor at a time, so a
    launch takes as many rounds as programs over multiprocessors, rounded up, of as many steps as a segment has chunks
    (and about one to begin). Segments cost an extra pass over half of the inputs, about a fifth of the time.
    """

    def steps(segments: int) -> float:
        length = -(-chunks // segments) + 1
        rounds = sum(-(-heads * n * segments // multiprocessors) for n in programs)
        return length * rounds * (1.0 if segments == 1 else 1.2)

    return min(range(1, max(1, chunks // MIN_SEGMENT_CHUNKS) + 1), key=steps)
