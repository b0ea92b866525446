"""One rank of a world of any size, alone on a CPU: `pretrain_yoco.main` up to the end of its first step.

Tensors are fake: they have sizes and no values, so they take no memory, and nothing is computed. What stands in for the
rest of the world is listed here, each with the place that needs it (paths inside the installed packages).
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import timers
from megatron.core import utils as core_utils
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import clip_grads
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.training import checkpointing, get_args, training
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from yoco_megatron.dry_run import gpu
from yoco_megatron.dry_run.gpu_layers import Linear
from yoco_megatron.dry_run.ledger import Call, Ledger
from yoco_megatron.ops.attention import torch as attention
from yoco_megatron.parallel.context import query_shard, sequence_shard
from yoco_megatron.startup import checks
from yoco_megatron.training import batch

STEP, CHECKPOINT = "the step", "a checkpoint"
DOCUMENT = 1000
"""Tokens of a packed document. With a loss everywhere memory does not depend on it, but for lists of their ends."""
# Flags that need a GPU, and the value that leaves each out: (destination, flag, value).
OF_GPUS = (
    ("fp8_param_gather", "--fp8-param-gather", False),
    ("tp_comm_overlap", "--tp-comm-overlap", False),
    ("cuda_graph_impl", "--cuda-graph-impl", "none"),
)


@dataclass(frozen=True)
class Shard:
    """A box of a tensor of the checkpoint, model and optimizer, that this rank would write."""

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class RankRecord:
    """What a rank did and holds; bytes and FLOPs are exact."""

    rank: int
    calls: tuple[Call, ...]
    flops: dict[str, int]
    """Of "products" with weights and of "attention", forward, recomputed and backward, in the step."""
    parameters: int
    state_bytes: dict[str, int]
    """Of weights, gradients and optimizer after the step."""
    peak_bytes: int
    """The most that lived in the step, these among them: what torch's allocator has to hold."""
    shards: tuple[Shard, ...]


def leave_out_flags_of_gpus(args: Namespace) -> list[str]:
    """Change `args`; returns the flags that it had."""
    had = [(name, flag, value) for name, flag, value in OF_GPUS if getattr(args, name) != value]
    for name, _, value in had:
        setattr(args, name, value)
    return [flag for _, flag, _ in had]


class _Finished(BaseException):
    """The step is done. No Exception, so that nothing on the way out takes it for a crash of training."""


def run_rank(main: Callable[[list[str]], None], argv: list[str], rank: int, world_size: int) -> RankRecord:
    """Run `main(argv)` as `rank` of so many. Changes this process for good: run it in a child.

    Raises:
        ValueError: a mistake in `argv`.
    """
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # startup/agreement.py: nobody to agree with
    }
    ledger = _FakeLedger()
    built: list[Any] = []  # model chunks, optimizer
    with ExitStack() as stack:
        for stand_in in _stand_ins(ledger, built):
            stack.enter_context(stand_in)
        stack.enter_context(ledger.live.following_resizes())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(ledger)
        try:
            main(argv)
        except _Finished:
            return _record(rank, ledger, *built)
    raise ValueError("the run ended before its first step: leave out --skip-train and --exit-* flags")


class _FakeLedger(Ledger):
    """Over fake tensors, which know no operators of torch.distributed, and no numbers."""

    def exchange(self, function: Any, args: tuple, kwargs: dict) -> Any:
        returns = len(function._schema.returns)
        work = FakeWork().boxed()
        return None if not returns else work if returns == 1 else (args[0], work)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            # All is well: no flag is set, no fault counted, a norm is one.
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        return super().__torch_dispatch__(function, types, args, kwargs)


def _stand_ins(ledger: Ledger, built: list[Any]) -> Iterator[Any]:
    start, new_group, set_up, step = (
        dist.init_process_group,
        dist.new_group,
        training.setup_model_and_optimizer,
        training.train_step,
    )

    def init_process_group(backend: str | None = None, **kwargs: Any) -> None:
        start("fake", store=FakeStore(), rank=kwargs["rank"], world_size=kwargs["world_size"])

    def fake_group(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        if ranks is not None and dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER  # at once: a large world has a hundred thousand of them
        return new_group(ranks, *args, **kwargs | {"backend": "fake"})

    # Objects are pickled into tensors' bytes, which fakes do not have: every rank says what this one says.
    def all_gather_object(object_list: list, obj: Any, group: Any = None) -> None:
        ledger.add_objects("all_gather_object", group)
        object_list[:] = [obj] * len(object_list)

    def gather_object(obj: Any, object_gather_list: list | None = None, dst: Any = None, group: Any = None, **_: Any):
        ledger.add_objects("gather_object", group)
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def broadcast_object_list(object_list: list, src: Any = None, group: Any = None, *_: Any, **__: Any) -> None:
        ledger.add_objects("broadcast_object_list", group)

    flags = Namespace()

    def check_machine(args: Namespace) -> None:
        """Not this one is meant."""
        leave_out_flags_of_gpus(args)
        vars(flags).update(vars(args))
        vars(args).update(gpu.OF_THIS_MACHINE)

    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        result = set_up(*args, **kwargs)
        built[:] = result[:2]
        for one in _inner_optimizers(result[1]):
            if one.init_state_fn:  # else the first step makes the states, when its activations are gone
                one.init_state_fn(one.optimizer, one.config)
        return result

    def train_step(*args: Any, **kwargs: Any) -> None:
        if get_num_microbatches() == 1:  # else the second micro-batch finds what the one before leaves
            calls = len(ledger.calls)
            step(*args, **kwargs)
            del ledger.calls[calls:]
        ledger.phase, ledger.live.peak = STEP, ledger.live.now
        step(*args, **kwargs)
        raise _Finished

    yield mock.patch.multiple(
        dist,
        init_process_group=init_process_group,
        new_group=fake_group,
        all_gather_object=all_gather_object,
        gather_object=gather_object,
        broadcast_object_list=broadcast_object_list,
    )
    yield mock.patch.multiple(
        training,
        setup_model_and_optimizer=setup_model_and_optimizer,
        train_step=train_step,
        build_train_valid_test_data_iterators=_iterators,
    )
    yield from gpu.stand_ins(flags)
    yield mock.patch.object(checks, "check_machine", check_machine)
    yield mock.patch.object(checks, "check_fits")  # asks for this machine's memory
    # core/utils.py makes a tensor of the numbers of others, which fakes do not have.
    yield mock.patch.object(clip_grads, "l2_norm_impl", _l2_norm)
    yield mock.patch.object(core_utils, "local_multi_tensor_l2_norm", _l2_norm)
    yield mock.patch.object(torch.nn.Module, "_apply", _apply)
    # torch/nn/attention/bias.py makes a class of tensor of its own, which fakes cannot be.
    yield mock.patch.object(attention, "causal_lower_right")
    # core/timers.py makes a list of a tensor, one number of each rank of the world.
    yield mock.patch.object(timers.Timers, "_get_global_min_max_time", return_value={})
    # Which rank sends which query: lengths depend on numbers, which are made of none but those of the run.
    yield mock.patch.object(query_shard, "_route", _with_numbers(query_shard._route))
    # Where documents begin decides sizes as well.
    yield mock.patch.object(batch, "document_ids", _with_numbers(_document_ids))
    shard = sequence_shard.SequenceShard
    yield mock.patch.object(shard, "__init__", _with_numbers(shard.__init__))


def _inner_optimizers(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _document_ids(_: torch.Tensor | None, length: int) -> torch.Tensor:
    """Documents of equal length, three in a short sequence."""
    document = min(DOCUMENT, -(-length // 3))
    return (torch.arange(length) // document).int().repeat(get_args().micro_batch_size, 1)


def _with_numbers(function: Callable) -> Callable:
    def with_numbers(*args: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args)

    return with_numbers


def _l2_norm(chunk_size: int, flag: Any, lists: list, per_tensor: bool, *_: Any) -> tuple[torch.Tensor, None]:
    return torch.stack([torch.norm(one) for tensors in lists for one in tensors]).norm().float()[None], None


def _apply(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
    """torch/nn/modules/module.py swaps fake parameters, which fails where something holds a weak reference to them."""
    for child in module.children():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.data = function(parameter.data)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _iterators(provider: Any) -> tuple[Iterator[dict[str, torch.Tensor]], None, None]:
    """(train, validation, test): no data is read."""
    args = get_args()
    args.do_train, args.do_valid, args.do_test = True, False, False

    def samples() -> Iterator[dict[str, torch.Tensor]]:
        shape = args.micro_batch_size, args.seq_length
        names = ("tokens", "labels", "position_ids")
        while True:
            sample = {name: torch.zeros(shape, dtype=torch.int64) for name in names} | {"loss_mask": torch.ones(shape)}
            if args.dataloader_inter_document_masking:
                # Others learn their number from what is broadcast, and see none: the list of ends stays here.
                sample["cu_seqlens"] = torch.zeros(args.micro_batch_size, 0, dtype=torch.int32)
                sample["max_seqlen"] = torch.zeros(args.micro_batch_size, dtype=torch.int32)
            yield sample

    return RerunDataIterator(samples()), None, None


def _record(rank: int, ledger: Ledger, model: list[Any], optimizer: Any) -> RankRecord:
    peak = ledger.live.peak + gpu.WORKSPACE_BYTES
    flops = {kind: count for (phase, kind), count in ledger.flops.items() if phase == STEP}
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    buffers = [buffer for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    inner = [one.optimizer for one in _inner_optimizers(optimizer)]
    in_fp8 = [module.in_fp8 for chunk in model for module in chunk.modules() if isinstance(module, Linear)]
    seen: set[int] = set()
    state_bytes = {
        "weights": _bytes([*parameters, *in_fp8], seen),
        "gradients": _bytes([buffer.grad_data for buffer in buffers], seen),
        "optimizer": _bytes(tree_leaves([(one.param_groups, list(one.state.values())) for one in inner]), seen),
    }
    parameter_count = sum(one.numel() for one in parameters)
    ledger.phase = CHECKPOINT
    shards = _shards(model, optimizer)
    return RankRecord(rank, tuple(ledger.calls), flops, parameter_count, state_bytes, peak, shards)


def _shards(model: list[Any], optimizer: Any) -> tuple[Shard, ...]:
    """That this rank would write of a checkpoint, as training makes it (training/checkpointing.py)."""
    metadata = {"metadata": checkpointing._build_sharded_state_dict_metadata(get_args())}
    names = ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]
    state = {name: chunk.sharded_state_dict(**metadata) for name, chunk in zip(names, model)}
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), **metadata)
    apply_factories(state)
    shards = []
    for one in nested_values(state):
        is_main = isinstance(one, ShardedTensor) and not any(tree_leaves(one.replica_id))
        if is_main:
            size = (1,) * one.prepend_axis_num + one.local_shape
            shards.append(Shard(one.key, one.global_shape, one.global_offset, size))
    return tuple(shards)


def _bytes(tensors: Iterable[Any], seen: set[int]) -> int:
    """Of the storages that are not among the seen ones yet."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in seen:
            seen.add(tensor.untyped_storage()._cdata)
            total += tensor.untyped_storage().nbytes()
    return total
