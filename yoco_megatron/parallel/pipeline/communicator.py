"""Pipeline transport of boundary tensors: each with the exact width of its boundary, and no message about shapes.

Megatron's schedules send one tensor per boundary and assume that all boundaries are equally wide. They accept a
communicator, and theirs asks `_communicate_shapes` for the shapes to receive when lengths vary. Here the answer is
computed: which stage's tensor arrives next follows from the schedule, which is deterministic.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table

Shape = tuple[int, int, int]


class SharedKVCommunicator(P2PCommunicator):
    """A communicator for one call of a schedule.

    Args:
        shape_into: shape of the tensor that enters stage g (counted as in stages.py).
        num_microbatches, forward_only: as the schedule is called.
    """

    def __init__(
        self,
        pp_group: torch.distributed.ProcessGroup,
        config: ModelParallelConfig,
        shape_into: Callable[[int], Shape],
        num_microbatches: int,
        forward_only: bool,
    ) -> None:
        own_config = copy.copy(config)  # the schedules use the real one
        own_config.variable_seq_lengths = True
        super().__init__(pp_group, own_config)
        forward, backward = arriving_stages(
            pp_group.rank(),
            pp_group.size(),
            config.virtual_pipeline_model_parallel_size or 1,
            num_microbatches,
            config.microbatch_group_size_per_vp_stage,
        )
        self._from_previous = deque(shape_into(g) for g in forward)
        self._from_next = deque(() if forward_only else (shape_into(g) for g in backward))

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Iterable[int], Iterable[int]]:
        return (
            self._from_previous.popleft() if recv_prev else (0, 0, 0),
            self._from_next.popleft() if recv_next else (0, 0, 0),
        )

    def finish(self) -> None:
        """Assert that every planned tensor has arrived; else Megatron's schedule has changed."""
        left = len(self._from_previous) + len(self._from_next)
        assert left == 0, f"{left} planned pipeline receives did not happen"


def arriving_stages(
    rank: int, ranks: int, model_chunks: int, num_microbatches: int, group: int | None
) -> tuple[list[int], list[int]]:
    """Order of arrivals on a pipeline rank.

    Args:
        model_chunks: per rank, more than one if stages are interleaved.
        group: micro-batches per group of the interleaved schedule; None for `ranks`.
    Returns:
        (g of each activation that arrives: it enters stage g; g of each gradient that arrives: that of the tensor which
        entered stage g). The first rank receives activations of its later model chunks from the last rank.
    """
    order = [0] * num_microbatches
    if model_chunks > 1:
        order = [chunk for _, chunk in get_schedule_table(num_microbatches, model_chunks, group or ranks)]
    last = model_chunks * ranks - 1
    forward = [chunk * ranks + rank for chunk in order] if rank > 0 else [(chunk + 1) * ranks for chunk in order]
    stage = [(model_chunks - 1 - chunk) * ranks + rank for chunk in order]
    if rank == 0:
        forward = [g for g in forward if g <= last]
    return forward, [g + 1 for g in stage if g < last]
