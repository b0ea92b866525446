"""Changes to Megatron's training loop, megatron/training/training.py, where it has no door."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import unwrap_model

from yoco_megatron.costs.flops import forward_flops_per_token
from yoco_megatron.costs.shape import ModelShape, parameter_count
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.context.query_shard import count
from yoco_megatron.parallel.pipeline.communicator import Shape, SharedKVCommunicator
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.upstream import step_positions
from yoco_megatron.upstream.deferred_nan_check import deferred_result_checks
from yoco_megatron.upstream.registry import replaces

TRAINING = "megatron.training.training"


@replaces(
    TRAINING,
    "get_forward_backward_func",
    digest="f28b8cf90a8985fa",
    calls=2,
    why="a schedule needs a communicator and look-ahead into the data for each call: only there are the number of "
    "micro-batches, which changes in a batch-size ramp-up, and the direction known",
)
def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable:
    """Megatron's schedule, in training and evaluation, which checks for NaN and Inf at the end of each call.

    Its forward_step gets what `forward_step.micro_batches` makes of each model chunk's data iterator; a YOCO over
    several pipeline stages a `SharedKVCommunicator`.
    """
    schedule = get_forward_backward_func.original(*args, **kwargs)

    @deferred_result_checks()
    def run(**call: Any) -> Any:
        chunks = call["model"] if isinstance(call["model"], list) else [call["model"]]
        data, wrap = call["data_iterator"], call["forward_step_func"].micro_batches
        readers = [wrap(*of_chunk) for of_chunk in zip(data if isinstance(data, list) else [data], chunks)]
        call["data_iterator"] = readers if isinstance(data, list) else readers[0]
        forward_only = call.get("forward_only", False)
        model = unwrap_model(chunks[0])
        communicator = None
        if isinstance(model, YOCOModel) and model.pp_group.size() > 1:
            plan = StagePlan.from_config(model.config)
            ranks, rank = model.pp_group.size(), model.pp_group.rank()
            sizes = call["micro_batch_size"], call["seq_length"]

            def shape_into(g: int, microbatch: int) -> Shape:
                held = g if g % ranks == rank else g - 1  # it enters this stage or, a gradient, comes back to it
                runs = readers[held // ranks].runs(microbatch)
                return model.boundary_shape(plan.stage(g), *sizes, None if runs is None else count(runs))

            communicator = SharedKVCommunicator(
                model.pp_group, model.config, shape_into, call["num_microbatches"], forward_only
            )
            call |= {"p2p_communicator": communicator, "pg_collection": model.pg_collection}
        result = schedule(**call)
        if communicator is not None:
            communicator.finish()
        if not forward_only:
            step_positions.gather(readers[0].counts())
        return result

    return run


@replaces(
    TRAINING,
    "dummy_train_step",
    digest="4491804a3c585d58",
    calls=1,
    why="with --iterations-to-skip it reads data as pretrain_gpt.py does, and broadcasts each batch, which fails with "
    "tensor parallelism, as our data have no attention mask",
)
def skip_step(data_iterator: Any) -> None:
    """Read the micro-batches of one step, on the processes that have them."""
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    while get_rerun_state_machine().should_run_forward_backward(data_iterator):
        for iterator in filter(None, iterators):
            for _ in range(get_num_microbatches()):
                next(iterator)


@replaces(
    TRAINING,
    "set_jit_fusion_options",
    digest="cf75a41b608209ef",
    calls=1,
    why="since torch 2.2 it only warms up compiled functions that a model without biases does not call: SwiGLU with a "
    "bias, and a residual's addition with a bias and dropout, each compiled twice at each start",
)
def skip_jit_warmup(tp_size: int | None = None) -> None:
    """Nothing: what is called is compiled in the first step."""


@replaces(
    TRAINING,
    "num_floating_point_operations",
    digest="3dc3dc6ef8f8f6d6",
    calls=2,
    why="it counts those of a GPT, for the throughput line and the total that a checkpoint saves",
)
def num_floating_point_operations(args: Namespace, batch_size: int, **_: Any) -> float:
    """FLOPs of the training iteration that has just been done, on `batch_size` sequences; the same on all ranks."""
    return step_positions.flops_of_step(args, batch_size)


_reported = False


@replaces(
    TRAINING,
    "report_theoretical_memory",
    digest="42626c10d5a71500",
    calls=1,
    why="it prints the memory of a GPT, at every log line",
)
def report_model(args: Namespace, num_microbatches: int | None = None, verbose: bool = False) -> None:
    """Print parameters and training FLOPs per token by part, once, with --verbose."""
    global _reported
    if _reported or not args.verbose:
        return
    _reported = True
    shape = ModelShape.from_args(args)
    parameters, flops = parameter_count(shape), forward_flops_per_token(shape)
    print(f"{args.architecture} of {sum(parameters.values()):,} parameters:")
    for part, weights in parameters.items():
        print(f"  {part:<22}{weights:>16,} parameters")
    print(f"{3 * sum(flops.values()) / 1e9:.3f} GFLOP a token to train, causal, at --seq-length {args.seq_length}:")
    for part, forward in flops.items():
        print(f"  {part:<22}{3 * forward / 1e9:>16.3f} GFLOP")


def prefer_cudnn_norms(args: Namespace) -> None:
    """Have Transformer Engine compute its norms with cuDNN, unless the environment says otherwise. A door of its own.

    Its own kernels are tuned for some widths only; at others, 3072 among them, cuDNN's take half the time. Only for
    training, where inputs have one shape, or a few with loss masks: cuDNN prepares itself anew for each. And not for so
    many values that 32 bits do not count them, which has not been tried.
    """
    values = args.seq_length * args.micro_batch_size // args.context_parallel_size * args.hidden_size
    if values >= 2**31:
        return
    for direction in ("FWD", "BWD"):
        os.environ.setdefault(f"NVTE_NORM_{direction}_USE_CUDNN", "1")
