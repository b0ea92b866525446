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
# A segment shorter than this costs more in its extra pass than it gains.
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
    """The pinned configuration of "forward", "backward" or "segment" for heads of `width`."""
    entries = _table()[kernel]
    return entries["float32"] if dtype == torch.float32 else entries["256" if width > 128 else "128"]


def num_segments(heads: int, chunks: int, slices: int, device: torch.device) -> int:
    """Segments that fill the GPU with two programs a multiprocessor; 1 where heads alone come near to it."""
    if device.type != "cuda":
        return 1
    slots = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    if 2 * heads * slices >= slots:
        return 1
    return max(1, min(slots // (heads * slices), chunks // MIN_SEGMENT_CHUNKS))
