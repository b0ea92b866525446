"""What a checkpoint holds of the distributed optimizer, without copies that nobody needs."""

from typing import Any

import torch
import torch.distributed as dist

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
    why="it takes each part of the optimizer's state to host memory, back to the GPU to gather it, to host memory "
    "again, and copies it there twice, while training waits; on the only rank of data parallelism there is nothing to "
    "gather",
)
def get_parameter_state_dp_zero(
    self: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> dict | None:
    """As Megatron's, for a save of all ranks: on one the optimizer's own tensors, on several gathered on the device."""
    if use_gloo_comm or empty_data or not return_on_all_ranks:
        return get_parameter_state_dp_zero.original(self, use_gloo_comm, empty_data, return_on_all_ranks)
    alone = self.data_parallel_group.size() == 1
    return {"buckets_coalesced": True} | {
        index: {
            dtype: _own(self, buffer) if alone else _gathered(self, buffer, buckets)
            for dtype, buckets in self.gbuf_ranges[index].items()
        }
        for index, buffer in enumerate(self.buffers)
    }


def _keys(optimizer: Any) -> tuple[str, ...]:
    return "param", *optimizer.optimizer_state_keys


def _own(optimizer: Any, buffer: Any) -> dict[str, _StateOfParameters]:
    return {key: _StateOfParameters(optimizer, key, buffer.param_index_map) for key in _keys(optimizer)}


def _gathered(optimizer: Any, buffer: Any, ranges: list[dict]) -> dict[str, Any]:
    """Name of a state -> that of all parameters of a buffer [numel without padding], fp32, in host memory."""
    group, device = optimizer.data_parallel_group, torch.cuda.current_device()
    whole = {key: torch.empty(buffer.numel_unpadded, dtype=torch.float32, device="cpu") for key in _keys(optimizer)}
    start = 0
    for bucket, of_bucket in zip(buffer.buckets, ranges):
        size, end = bucket.grad_data.numel(), start + bucket.numel_unpadded
        own = {key: torch.zeros(size // group.size(), dtype=torch.float32, device=device) for key in whole}
        for param, places in of_bucket["param_map"].items():
            states = optimizer._get_main_param_and_optimizer_states(param)
            for key, shard in own.items():
                shard[places["gbuf_local"].start : places["gbuf_local"].end].copy_(states[key].detach().view(-1))
        together = torch.empty(size, dtype=torch.float32, device=device)
        for key, shard in own.items():
            dist.all_gather_into_tensor(together, shard, group=group)
            whole[key][start:end].copy_(together[: end - start])
        start = end
    return whole | {"numel_unpadded": buffer.numel_unpadded}


relies_on(
    OPTIMIZER,
    "DistributedOptimizer._get_main_param_and_optimizer_states",
    digest="0fd32fc857d72b8b",
    used_by="upstream/optimizer_state.py",
    why="the states of one parameter by name, each as long as this rank's part of it",
)
