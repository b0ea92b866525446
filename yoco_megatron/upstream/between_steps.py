"""What is done with the model between two steps of training, of which training then knows nothing."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.utils import get_model_config
from megatron.training import get_args, get_timers, training
from megatron.training.global_vars import get_energy_monitor
from torch import Tensor

from yoco_megatron.upstream.registry import relies_on, replaces

at_evaluation: list[Callable[[Sequence[torch.nn.Module], int], None]] = []
"""Called on every process with the model's chunks, in evaluation mode, and the number of steps made."""


@replaces(
    "megatron.training.training",
    "post_training_step_callbacks",
    digest="1e4a97c931d06eb6",
    calls=1,
    when=lambda args: args.evaluate_suite is not None,
    why="its door, non_loss_data_func, opens at its --eval-interval alone, and only where there are validation data",
)
def post_training_step_callbacks(
    model: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any, iteration: int, *rest: Any, **named: Any
) -> Any:
    """Megatron's, and then what is due."""
    result = post_training_step_callbacks.original(model, optimizer, scheduler, iteration, *rest, **named)
    args = get_args()
    if args.evaluate_suite is not None and iteration % args.evaluate_interval == 0:
        with _set_aside(model, optimizer), _unchanged_state(model), torch.no_grad():
            for act in at_evaluation:
                act(model, iteration)
    return result


relies_on(
    "megatron.training.training",
    "evaluate",
    digest="7b6ad88b626fe0cc",
    used_by="upstream/between_steps.py",
    why="_set_aside does what it, and the loop around it, do before and after",
)


@contextmanager
def _set_aside(model: Sequence[torch.nn.Module], optimizer: Any) -> Iterator[None]:
    """Inside, the training loop stands still, as it does around Megatron's evaluation."""
    args, timers, machine, config = get_args(), get_timers(), get_rerun_state_machine(), get_model_config(model[0])
    if args.log_energy:
        get_energy_monitor().pause()
    timers("interval-time").stop()
    # Parameters are gathered in the forward pass of a step, from the first step on that changed them.
    gathers = training.should_disable_forward_pre_hook(args) and any(
        chunk.remove_forward_pre_hook_handles for chunk in model
    )
    if gathers:
        training.disable_forward_pre_hook(model, optimizer=optimizer)
    own_timers, mode = config.timers, machine.get_mode()
    config.timers = None
    machine.set_mode(RerunMode.DISABLED)
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model:
            chunk.train()
        machine.set_mode(mode)
        config.timers = own_timers
    if gathers:
        training.enable_forward_pre_hook(model)
    timers("interval-time", log_level=0).start(barrier=True)
    if args.log_energy:
        get_energy_monitor().resume()


@contextmanager
def _unchanged_state(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """At the end, random numbers go on, and FP8 scales, where they had stopped."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    generators = [(one, one.get_state()) for one in states.values() if isinstance(one, torch.Generator)]  # CUDA graphs
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state()
    scales = [(scale, scale.clone()) for scale in fp8_scales(model)]
    try:
        yield
    finally:
        for scale, before in scales:
            scale.copy_(before)
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        torch.set_rng_state(numbers[2])
        torch.cuda.set_rng_state(numbers[3])
        for generator, before in generators:
            generator.set_state(before)
        tracker.set_states(states)


def fp8_scales(model: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """What Transformer Engine's delayed scaling keeps of past steps; a forward pass without gradients adds to it."""
    for chunk in model:
        for module in chunk.modules():
            recipe_states = getattr(module, "fp8_meta", None) or {}
            for direction in ("scaling_fwd", "scaling_bwd"):
                for name in ("scale", "scale_inv", "amax_history"):
                    found = getattr(recipe_states.get(direction), name, None)
                    if isinstance(found, Tensor):
                        yield found
