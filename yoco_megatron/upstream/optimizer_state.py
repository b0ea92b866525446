"""What a checkpoint holds of the distributed optimizer, without copies that nobody needs."""

from typing import Any

import torch

from yoco_megatron.upstream.registry import relies_on, replaces

OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"


class _StateOfParameters:
    """In the place of one long tensor of a buffer: a slice from a parameter's start to its end is that state itself."""

    def __init__(self, optimizer: Any, key: str, index_map: dict) -> None:
        self.optimizer, self.key = optimizer, key
        self.param_at = {(start, end): param for param, (start, end, _) in index_map.items()}

    def __getitem__(self, part: slice) -> torch.Tensor:
        state = self.optimizer._get_main_param_and_optimizer_states(self.param_at[part.start, part.stop])[self.key]
        # The precision-aware optimizer makes it for us, for all parameters more than a GPU may have room for.
        made = self.optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        return (state.cpu() if made else state).detach().view(-1)


@replaces(
    OPTIMIZER,
    "DistributedOptimizer.get_parameter_state_dp_zero",
    digest="c87e8ab28bfd9cae",
    why="on the only rank of data parallelism nothing has to be gathered, but it copies the optimizer's state several "
    "times in host memory, for which training waits",
)
def get_parameter_state_dp_zero(
    self: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> dict | None:
    """Megatron's; on one rank, for a save of all ranks, with the optimizer's own tensors."""
    if empty_data or not return_on_all_ranks or self.data_parallel_group.size() > 1:
        return get_parameter_state_dp_zero.original(self, use_gloo_comm, empty_data, return_on_all_ranks)
    keys = ("param", *self.optimizer_state_keys)
    return {"buckets_coalesced": True} | {
        index: {
            dtype: {key: _StateOfParameters(self, key, self.buffers[index].param_index_map) for key in keys}
            for dtype in ranges
        }
        for index, ranges in enumerate(self.gbuf_ranges)
    }


relies_on(
    OPTIMIZER,
    "DistributedOptimizer._get_main_param_and_optimizer_states",
    digest="0fd32fc857d72b8b",
    used_by="upstream/optimizer_state.py",
    why="the states of one parameter by name, each as long as this rank's part of it",
)
