"""Whole gradients and weights of which this rank holds a part."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from yoco_megatron.model.init import is_of_expert


def gather_whole(name: str, tensor: Tensor, parameter: Tensor) -> Tensor:
    """The whole matrix of which this tensor-parallel rank holds a part, by global name; its gradient or its weight."""
    of_expert = is_of_expert(name)
    group = mpu.get_expert_tensor_parallel_group() if of_expert else mpu.get_tensor_model_parallel_group()
    if group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    if name.endswith("linear_fc1.weight"):  # [gate; up]: a rank holds a part of each half
        return torch.cat([torch.cat([part.chunk(2)[half] for part in parts]) for half in (0, 1)])
    return torch.cat(parts, dim=parameter.partition_dim)  # type: ignore[attr-defined]


def reduced_gradient(parameter: Tensor, model: DistributedDataParallel) -> Tensor:
    """What data parallelism has made of the gradient, on every rank.

    The distributed optimizer reduces to shards: the rest of a rank's flat buffer is its own.
    """
    gradient = parameter.main_grad.clone()  # type: ignore[attr-defined]
    if not model.ddp_config.use_distributed_optimizer:
        return gradient
    buffers = [*model.buffers, *model.expert_parallel_buffers]
    buffer = next(one for one in buffers if parameter in one.param_index_map)
    start, end, index = buffer.param_index_map[parameter]
    bucket, group = buffer.buckets[index], buffer.data_parallel_group
    shard = bucket.grad_data.clone().chunk(group.size())[group.rank()].contiguous()
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard, group=group)
    return torch.cat(parts)[start - bucket.offset : end - bucket.offset].view(parameter.shape)


def with_all_experts(found: dict[str, Any]) -> dict[str, Any]:
    """With what the other ranks of expert parallelism found of their experts."""
    group = mpu.get_expert_model_parallel_group()
    parts: list[dict[str, Any]] = [{}] * group.size()
    dist.all_gather_object(parts, found, group=group)
    return {name: value for part in parts for name, value in part.items()} | found
