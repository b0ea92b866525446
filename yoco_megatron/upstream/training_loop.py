"""The places where a door is missing in Megatron's training loop, `megatron/training/training.py`.

It calls `num_floating_point_operations` for its throughput line and for the total that it saves, and
`report_theoretical_memory` after the first iterations; both know GPT alone. It asks `get_forward_backward_func` for a
schedule, and has no way to hand that schedule a communicator per call. It leaves out --iterations-to-skip with
`dummy_train_step`, which takes the data for those of pretrain_gpt.py. In `set_jit_fusion_options` it
compiles what a YOCO does not call. Ours take their place under the same names.
"""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import unwrap_model
from megatron.training import training

from yoco_megatron.costs.flops import forward_flops_per_token, train_flops
from yoco_megatron.costs.shape import ModelShape, parameter_count
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.pipeline.communicator import SharedKVCommunicator
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.upstream.deferred_nan_check import validation_at_the_end

_get_forward_backward_func = training.get_forward_backward_func


def schedule_steps() -> None:
    """Validate results at the end of each schedule's call, and give it a communicator that knows each boundary's shape.

    The loop asks `get_forward_backward_func` for its schedule, in training and in evaluation; only there, call by call,
    are the number of micro-batches (it changes in a batch-size ramp-up) and the direction known.
    """
    training.get_forward_backward_func = get_forward_backward_func


def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable:
    """Megatron's schedule; for a YOCO over several pipeline stages, with `SharedKVCommunicator`."""
    schedule = _get_forward_backward_func(*args, **kwargs)

    @validation_at_the_end()
    def run(**call: Any) -> Any:
        chunks = call["model"] if isinstance(call["model"], list) else [call["model"]]
        model = unwrap_model(chunks[0])
        if not isinstance(model, YOCOModel) or model.pp_group.size() == 1:
            return schedule(**call)
        plan = StagePlan.from_config(model.config)
        communicator = SharedKVCommunicator(
            model.pp_group,
            model.config,
            lambda g: model.boundary_shape(plan.stage(g), call["micro_batch_size"], call["seq_length"]),
            call["num_microbatches"],
            call.get("forward_only", False),
        )
        call |= {"p2p_communicator": communicator, "pg_collection": model.pg_collection}
        result = schedule(**call)
        communicator.finish()
        return result

    return run


def skip_batches() -> None:
    """Have --iterations-to-skip leave out what `training.batch` would read."""
    training.dummy_train_step = skip_step


def skip_step(data_iterator: Any) -> None:
    """Read the micro-batches of one step on the processes that have them. Megatron broadcasts each besides, which fails
    with tensor parallelism, as our data have no attention mask.
    """
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    while get_rerun_state_machine().should_run_forward_backward(data_iterator):
        for iterator in filter(None, iterators):
            for _ in range(get_num_microbatches()):
                next(iterator)


def compile_what_is_called() -> None:
    """Leave out Megatron's warm-up of compiled functions, with which each start on a GPU compiles two of them twice.

    They are SwiGLU with a bias, and the residual's addition with a bias and a dropout of 0.1, each for an input with
    and without gradient. Without biases, by default, others are called; what is called is compiled in the first step.
    """
    training.set_jit_fusion_options = compile_nothing


def compile_nothing(tp_size: int | None = None) -> None:
    """Megatron's `set_jit_fusion_options` is this and the warm-up since torch 2.2."""


def take_norms_of_cudnn(args: Namespace) -> None:
    """Have Transformer Engine compute its norms with cuDNN, unless the environment says otherwise.

    Its own kernels are tuned for some widths only; at others, 3072 among them, cuDNN's take half the time. Only for
    training, where all inputs have one shape: cuDNN prepares itself anew for each. And not for so many values that 32
    bits do not count them, which has not been tried.
    """
    values = args.seq_length * args.micro_batch_size // args.context_parallel_size * args.hidden_size
    if values >= 2**31:
        return
    for direction in ("FWD", "BWD"):
        os.environ.setdefault(f"NVTE_NORM_{direction}_USE_CUDNN", "1")


def count_yoco() -> None:
    """Make Megatron's throughput and size figures those of the model that is trained."""
    training.num_floating_point_operations = num_floating_point_operations
    training.report_theoretical_memory = report_model


def num_floating_point_operations(args: Namespace, batch_size: int, **_: Any) -> float:
    """FLOPs of one training iteration on `batch_size` sequences."""
    return train_flops(ModelShape.from_args(args), batch_size)


_reported = False


def report_model(args: Namespace, num_microbatches: int | None = None, verbose: bool = False) -> None:
    """Print parameters and training FLOPs a token by part, once. (Megatron prints a GPT's memory every time.)"""
    global _reported
    if _reported:
        return
    _reported = True
    shape = ModelShape.from_args(args)
    parameters, flops = parameter_count(shape), forward_flops_per_token(shape)
    print(f"{args.architecture} of {sum(parameters.values()):,} parameters:")
    for part, count in parameters.items():
        print(f"  {part:<22}{count:>16,} parameters")
    print(f"{3 * sum(flops.values()) / 1e9:.3f} GFLOP a token to train, causal, at --seq-length {args.seq_length}:")
    for part, count in flops.items():
        print(f"  {part:<22}{3 * count / 1e9:>16.3f} GFLOP")
