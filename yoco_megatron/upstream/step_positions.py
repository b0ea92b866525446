"""Where the data have loss masks of their own: positions with a loss, and computed ones, for the log and FLOP counts.

Each data-parallel rank has other samples. What they count is gathered between hosts while the GPUs compute, so that
nothing waits; a step's FLOPs are those of all ranks, and the log shows how far ranks are apart, as the slowest one
holds up the others.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import astuple
from functools import reduce
from operator import add

import torch
import torch.distributed as dist
from megatron.core import mpu

from yoco_megatron.config.resolve import queries_vary
from yoco_megatron.costs.flops import Queries, train_flops
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.parallel.host_group import host_group
from yoco_megatron.training.query_positions import PositionCounts

_gathered: tuple[torch.Tensor, dist.Work | None] | None = None
"""Of the last step: a row of counts for each data-parallel rank, complete when the work is."""
_since_line: list[PositionCounts] = []
"""Sums over the steps since the last line, by data-parallel rank; empty where masks do not vary."""


def gather(counts: PositionCounts | None) -> None:
    """Begin to gather those of a step from all data-parallel ranks; None where masks do not vary."""
    global _gathered
    if counts is None:
        _gathered = None
        return
    group, mine = mpu.get_data_parallel_group(), torch.tensor([astuple(counts)])
    if group.size() == 1:
        _gathered = mine, None
        return
    everyone = mine.new_empty(group.size(), mine.shape[1])
    _gathered = everyone, dist.all_gather_into_tensor(everyone, mine, group=host_group(group), async_op=True)


def _of_step() -> list[PositionCounts]:
    """By data-parallel rank; empty where masks do not vary."""
    if _gathered is None:
        return []
    everyone, work = _gathered
    if work is not None:
        work.wait()
    return [PositionCounts(*row) for row in everyone.tolist()]


def _flops(args: Namespace, counts: list[PositionCounts]) -> float:
    total = reduce(add, counts)
    queries = Queries(total.computed / total.positions, total.keys / total.positions)
    return train_flops(ModelShape.from_args(args), total.positions // args.seq_length, queries)


def flops_of_step(args: Namespace, sequences: int) -> float:
    """Of the step that has just been done, on so many sequences."""
    counts = _of_step()
    return _flops(args, counts) if counts else train_flops(ModelShape.from_args(args), sequences)


def flops_since_line(args: Namespace, sequences: int, steps: int) -> float:
    """Of the steps since the last line, so many of so many sequences."""
    if _since_line:
        return _flops(args, _since_line)
    return steps * train_flops(ModelShape.from_args(args), sequences)


def add_step() -> None:
    """Count the step that has just been done among those since the last line."""
    global _since_line
    counts = _of_step()
    _since_line = [one + more for one, more in zip(_since_line, counts)] if len(_since_line) == len(counts) else counts


def start_line() -> None:
    """A line was printed: count anew."""
    _since_line.clear()


def state() -> list[tuple[int, int, int, int]]:
    """Of the steps since the last line, for a checkpoint."""
    return [astuple(one) for one in _since_line]


def fits(args: Namespace, saved: Sequence[tuple[int, ...]]) -> bool:
    """Whether a checkpoint's counts can be gone on with: not with another number of ranks."""
    return len(saved) == (mpu.get_data_parallel_world_size() if queries_vary(args) else 0)


def resume(saved: Sequence[tuple[int, ...]]) -> None:
    """Go on with a checkpoint's."""
    global _since_line
    _since_line = [PositionCounts(*counts) for counts in saved]


def shares() -> dict[str, list[float]]:
    """Of the positions of each data-parallel rank since the last line; nothing where masks do not vary."""
    if not _since_line:
        return {}
    return {
        "with a loss": [counts.with_loss / counts.positions for counts in _since_line],
        "computed": [counts.computed / counts.positions for counts in _since_line],
    }


def texts() -> list[str]:
    """For a step's line: the means, and how far data-parallel ranks are apart."""
    parts = []
    for name, of_ranks in shares().items():
        apart = f" ({100 * min(of_ranks):.1f} to {100 * max(of_ranks):.1f})" if len(of_ranks) > 1 else ""
        parts.append(f"positions {name} {100 * sum(of_ranks) / len(of_ranks):.1f}%{apart}")
    return parts


def scalars() -> dict[str, float]:
    """For TensorBoard and wandb."""
    found: dict[str, float] = {}
    for name, of_ranks in shares().items():
        key = f"positions/{name.replace(' ', '-')}"
        found |= {key: sum(of_ranks) / len(of_ranks), f"{key}-min": min(of_ranks), f"{key}-max": max(of_ranks)}
    return found
