"""The micro-batches of one call of a schedule, each with the runs of its queries.

Where the data have masks of their own, each micro-batch computes other positions. A pipeline asks how many before it
receives a micro-batch's hidden states, so that it is read before it is computed. Tensor-parallel rank 0 reads it, and
tells the others by way of the host: an answer from the device would have each host wait for all that it has launched.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import partial, reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_args

from yoco_megatron.config.resolve import queries_vary
from yoco_megatron.parallel.context.query_shard import Runs
from yoco_megatron.parallel.host_group import host_group
from yoco_megatron.training.batch import needs_data
from yoco_megatron.training.query_positions import PositionCounts, masked_query_runs, query_runs

FindQueries = Callable[[Any], tuple[Runs | None, PositionCounts]]


class MicroBatches:
    """Iterator of (sample, runs) for one model chunk, where all micro-batches have the same runs.

    Args:
        data_iterator: samples as the data loader makes them; None where none is read: then a sample is None.
    """

    def __init__(self, data_iterator: Iterator[Any] | None, runs: Runs | None = None) -> None:
        self._data, self._runs = data_iterator, runs

    def runs(self, microbatch: int) -> Runs | None:
        """Runs of a micro-batch of this call, also of one that is to come; None for all positions."""
        return self._runs

    def counts(self) -> PositionCounts | None:
        """Sums over the micro-batches; None where they are the same for all."""
        return None

    def __iter__(self) -> Iterator[tuple[Any, Runs | None]]:
        return self

    def __next__(self) -> tuple[Any, Runs | None]:
        return None if self._data is None else next(self._data), self._runs


class MaskedMicroBatches(MicroBatches):
    """The same, where each sample says which positions have a loss.

    Args:
        find: (sample) -> its runs and counts.
        group: host group of the tensor-parallel ranks, the first of which has the data; None for one rank.
    """

    def __init__(
        self, data_iterator: Iterator[Any] | None, find: FindQueries, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(data_iterator)
        self._find, self._group = find, group
        self._found: list[tuple[Runs | None, PositionCounts]] = []
        self._samples: deque[Any] = deque()
        """Read, and not yet computed."""

    def runs(self, microbatch: int) -> Runs | None:
        while len(self._found) <= microbatch:
            self._read()
        return self._found[microbatch][0]

    def counts(self) -> PositionCounts:
        return reduce(add, (counts for _, counts in self._found))

    def __next__(self) -> tuple[Any, Runs | None]:
        runs = self.runs(len(self._found) - len(self._samples))
        return self._samples.popleft(), runs

    def _read(self) -> None:
        sample, found = None, None
        if self._group is None or self._group.rank() == 0:
            assert self._data is not None
            sample = next(self._data)
            found = self._find(sample)
        self._samples.append(sample)
        self._found.append(_from_first_rank(found, self._group))


def _from_first_rank(
    found: tuple[Runs | None, PositionCounts] | None, group: dist.ProcessGroup | None
) -> tuple[Runs | None, PositionCounts]:
    """On all ranks of a host group what its first rank found; there are at most some thousand runs."""
    if group is None:
        assert found is not None
        return found
    runs, counts = found or (None, PositionCounts())
    header = torch.tensor([-1 if runs is None else len(runs), *astuple(counts)])
    dist.broadcast(header, group=group, group_src=0)
    number, *sums = header.tolist()
    if number >= 0:
        edges = torch.empty(number, 2, dtype=torch.int64) if runs is None else torch.tensor(runs)
        dist.broadcast(edges, group=group, group_src=0)
        runs = tuple((start, stop) for start, stop in edges.tolist())
    return runs, PositionCounts(*sums)


def micro_batches(data_iterator: Iterator[Any] | None, model: torch.nn.Module) -> MicroBatches:
    """Those of one call of a schedule.

    Args:
        data_iterator: Megatron's for a model chunk; None off tensor-parallel rank 0.
        model: the chunk, wrapped as Megatron wraps it.
    """
    args = get_args()
    if not queries_vary(args):
        read = needs_data(args, get_attr_wrapped_model(model, "vp_stage"))
        return MicroBatches(data_iterator if read else None, query_runs(args))
    group = mpu.get_tensor_model_parallel_group()
    find = partial(masked_query_runs, args=args)
    return MaskedMicroBatches(data_iterator, find, host_group(group) if group.size() > 1 else None)
