"""Pinned launch configurations of the retention kernels, and how many segments a sequence is cut into.

Nothing is tuned while training: Triton's choice would differ from run to run, and with it the rounding.
`benchmarks/tune_retention.py` measures the candidates and writes this table's file.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# Tokens per chunk: 64 is the M of Hopper's matrix instructions.
CHUNK = 64
TABLE = Path(__file__).with_name("tuning.json")
# Shorter segments cost more in states written and read than they gain.
MIN_SEGMENT_CHUNKS = 8
# What `num_segments` assumes about the states of segments. With random gate logits of mean 0 the last 9 chunks are
# relevant at a segment's end, with mean 1 the last 18, from mean 3 on all of them.
RELEVANT_CHUNKS = 16
# 64 KB (heads of 128) written, chained (read and written) and read once more; a step moves 48 KB.
STATE_STEPS = 4
# The chain goes from segment to segment: a read from L2, 0.3 of the 1.7 us of a step.
CHAIN_STEPS = 0.2


@dataclass(frozen=True)
class Config:
    """The `columns` of z for which one program holds the state, and Triton's launch options."""

    columns: int
    num_warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return dict(num_warps=self.num_warps, STAGES=self.stages)

    def slices(self, width: int) -> int:
        """Programs that share the columns of a state of `width`."""
        return width // min(width, self.columns)

    def tiles(self, key_dim: int, value_dim: int) -> int:
        """Tiles of a state; the pass over segments has one program for each."""
        return self.slices(key_dim) * self.slices(value_dim)


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
def num_segments(heads: int, chunks: int, programs: tuple[int, ...], tiles: int, multiprocessors: int) -> int:
    """Into how many segments to cut a sequence of `chunks`, so that programs fill the GPU at the lowest cost.

    `programs` run per head and segment in each launch (forward, backward). The unit is a step: one program, one chunk.
    One program runs on a multiprocessor at a time, so a launch takes as many rounds as programs over multiprocessors,
    rounded up, each as long as a segment (and about one step to begin).

    Before each launch with segments comes a pass that computes the states which enter all but the first: `tiles`
    programs per head and segment, each of which reads what is still relevant at its segment's end (decay decides how
    much, and the host cannot know it) and writes a tile of the state (the constants are those of heads of 128, which
    are one tile). These are short and uneven, so their rounds are not rounded up. Then comes the chain.
    """

    def steps(segments: int) -> float:
        length = -(-chunks // segments)
        scans = sum(-(-heads * n * segments // multiprocessors) for n in programs) * (length + 1)
        if segments == 1:
            return scans
        rounds = max(1.0, heads * tiles * (segments - 1) / multiprocessors)
        states = rounds * (min(length, RELEVANT_CHUNKS) + STATE_STEPS) + segments * CHAIN_STEPS
        return scans + len(programs) * states

    return min(range(1, max(1, chunks // MIN_SEGMENT_CHUNKS) + 1), key=steps)


def span_segments(programs: int, chunks: int, multiprocessors: int) -> int:
    """Segments for a pass over states alone, with `programs` per segment: as many as run at once."""
    return max(1, min(multiprocessors // programs, chunks // MIN_SEGMENT_CHUNKS))
