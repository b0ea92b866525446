"""`Card`: how fast a GPU is in training, and its links.

The figures come from breakdowns of one H100 (benchmarks/breakdown.py) and from two rows of two; none is fitted to the
other rows that tests/costs/test_measured.py compares. The network's are assumed.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import pairwise

from yoco_megatron.costs.gpu_peak import TFLOPS
from yoco_megatron.costs.stage_time import Rates


@dataclass(frozen=True)
class Link:
    """A way between GPUs."""

    bytes_per_second: float
    """That a rank sends in a ring of all-gathers or reduce-scatters."""
    latency: float
    """Seconds of a message."""

    def seconds(self, size: float) -> float:
        """For `size` bytes a rank."""
        return size / self.bytes_per_second + self.latency


@dataclass(frozen=True)
class Card:
    """A GPU in a node of `gpus_per_node`."""

    name: str
    gib: float
    """Memory that a process can allocate."""
    linear: float = 690e12
    """FLOP/s of the layers' matrix products in bf16."""
    linear_fp8: float = 1000e12
    head_in_chunks: float = 638e12
    """FLOP/s of head and loss in chunks (--loss-chunk-size)."""
    head_at_once: float = 356e12
    """And with Megatron's loss."""
    attention: tuple[tuple[int, float], ...] = ((4096, 338e12), (32768, 430e12), (131072, 490e12))
    """(tokens, FLOP/s) of causal attention; between these it grows with the logarithm of the length."""
    elementwise: float = 4.2e-12
    """As `Rates.elementwise`."""
    optimizer: float = 1.92e-11
    """Seconds a parameter of a rank's shard."""
    fixed: float = 20e-3
    """Seconds a step in which no kernel runs."""
    launch: float = 3.3e-3
    """Seconds of the host for the kernels of a layer, forward and backward."""
    launch_tensor_parallel: float = 7.0e-3
    """The same with tensor parallelism."""
    node: Link = Link(280e9, 12e-6)
    network: Link = Link(40e9, 25e-6)
    """Between nodes: one adapter of 400 Gbit/s a GPU, at 80%."""
    gpus_per_node: int = 8
    watts: float = 700.0
    """Of the GPU at full load, by its data sheet."""

    @property
    def peak(self) -> float:
        """FLOP/s by the data sheet, bf16."""
        return TFLOPS[self.name] * 1e12

    def link(self, span: int) -> Link:
        """Between ranks of a group that `span` neighbouring GPUs hold."""
        return self.node if span <= self.gpus_per_node else self.network

    def rates(self, args: Namespace) -> Rates:
        """Of these flags."""
        return Rates(
            linear=self.linear_fp8 if args.fp8 else self.linear,
            attention=_between(self.attention, args.seq_length),
            output_layer=self.head_in_chunks if args.loss_chunk_size else self.head_at_once,
            elementwise=self.elementwise * (1.05 if args.recompute_elementwise else 1.0),
        )


def _between(points: tuple[tuple[int, float], ...], length: int) -> float:
    if length <= points[0][0]:
        return points[0][1]
    for (shorter, low), (longer, high) in pairwise(points):
        if length <= longer:
            return low + (high - low) * math.log(length / shorter) / math.log(longer / shorter)
    return points[-1][1]


H100 = Card("H100", gib=79.1)
CARDS = {"h100": H100, "h200": replace(H100, name="H200", gib=139.8)}
