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
        shape_into: shape of the tensor of a micro-batch that enters stage g (counted as in stages.py); asked when it is
            about to arrive.
        num_microbatches, forward_only: as the schedule is called.
    """

    def __init__(
        self,
        pp_group: torch.distributed.ProcessGroup,
        config: ModelParallelConfig,
        shape_into: Callable[[int, int], Shape],
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
        self._shape_into = shape_into
        self._from_previous, self._from_next = deque(forward), deque(() if forward_only else backward)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Iterable[int], Iterable[int]]:
        return (
            self._shape_into(*self._from_previous.popleft()) if recv_prev else (0, 0, 0),
            self._shape_into(*self._from_next.popleft()) if recv_next else (0, 0, 0),
        )

    def finish(self) -> None:
        """Assert that every planned tensor has arrived; else Megatron's schedule has changed."""
        left = len(self._from_previous) + len(self._from_next)
        assert left == 0, f"{left} planned pipeline receives did not happen"


def arriving_stages(
    rank: int, ranks: int, model_chunks: int, num_microbatches: int, group: int | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Order of arrivals on a pipeline rank.

    Args:
        model_chunks: per rank, more than one if stages are interleaved.
        group: micro-batches per group of the interleaved schedule; None for `ranks`.
    Returns:
        ((g, micro-batch) of each activation that arrives: it enters stage g; (g, micro-batch) of each gradient that
        arrives: that of the tensor which entered stage g). The first rank receives activations of its later model
        chunks from the last rank.
    """
    order = [(microbatch, 0) for microbatch in range(num_microbatches)]
    if model_chunks > 1:
        order = get_schedule_table(num_microbatches, model_chunks, group or ranks)
    last = model_chunks * ranks - 1
    # The first rank's activations come from the last rank, and enter its next model chunk.
    forward = [((chunk + (rank == 0)) * ranks + rank, microbatch) for microbatch, chunk in order]
    stage = [((model_chunks - 1 - chunk) * ranks + rank, microbatch) for microbatch, chunk in order]
    return [(g, n) for g, n in forward if g <= last], [(g + 1, n) for g, n in stage if g < last]
