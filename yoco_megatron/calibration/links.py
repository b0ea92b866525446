"""NCCL's bandwidth and latency: inside a node, and between nodes where there are several."""

import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from yoco_megatron import runtime
from yoco_megatron.calibration.timing import synchronize

SMALL = 1 << 13  # bytes of which the latency decides
CALLS = 20


@dataclass(frozen=True)
class Ring:
    """(bytes that a rank holds, seconds of an all-gather and of a reduce-scatter, in the mean) by size."""

    ranks: int
    times: list[tuple[int, float]]

    @property
    def gb_per_s(self) -> float:
        """That a rank sends, of the largest."""
        size, time = self.times[-1]
        return size * (self.ranks - 1) / self.ranks / time / 1e9

    @property
    def latency_us(self) -> float:
        """Of the smallest."""
        return self.times[0][1] * 1e6


def measure(largest: int) -> dict[str, Ring]:
    """{node, network: a ring}, those of which this world has any; every rank calls it."""
    world = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    found = {}
    if local > 1:
        groups = [dist.new_group(list(range(first, first + local))) for first in range(0, world, local)]
        found["node"] = _ring(groups[dist.get_rank() // local], largest)
    if world > local:  # one rank of each node, all of a node's at once
        groups = [dist.new_group(list(range(first, world, local))) for first in range(local)]
        found["network"] = _ring(groups[dist.get_rank() % local], largest)
    return found


def _ring(group: dist.ProcessGroup, largest: int) -> Ring:
    ranks, times, size = group.size(), [], min(SMALL, largest)
    while True:
        whole = torch.zeros(size, dtype=torch.uint8, device=runtime.device())
        part = torch.zeros(size // ranks, dtype=torch.uint8, device=runtime.device())
        whole = whole[: len(part) * ranks]
        times.append((len(whole), _seconds(whole, part, group)))
        if size >= largest:
            return Ring(ranks, times)
        size = min(largest, size * 8)


def _seconds(whole: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Of one collective, in the mean over ranks."""

    def both() -> None:
        dist.all_gather_into_tensor(whole, part, group=group)
        dist.reduce_scatter_tensor(part, whole, group=group)

    both()
    synchronize()
    dist.barrier(group)
    start = time.perf_counter()
    for _ in range(CALLS):
        both()
    synchronize()
    return (time.perf_counter() - start) / CALLS / 2
