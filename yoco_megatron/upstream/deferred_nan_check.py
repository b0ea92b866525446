"""Batches Megatron's NaN/Inf checks into one device-to-host copy per step.

Megatron checks every bucket of gradients twice (where these are reduced while backward runs), and every micro-batch's
loss twice. Each time the host waits for the GPU, which then waits for new work. Here the results stay on the GPU, and
all are checked together when the step's backward has ended, before the optimizer, by the same rules, in the same order,
with the same messages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

from yoco_megatron.upstream.registry import relies_on

relies_on(
    "megatron.core.rerun_state_machine",
    "RerunStateMachine.validate_result",
    digest="db2d21eebbaa7a48",
    used_by="upstream/deferred_nan_check.py",
    why="replaced on the machine for one call of the schedule: it may be called later, in the same order",
)


@contextmanager
def deferred_result_checks() -> Iterator[None]:
    """Inside, `validate_result` of Megatron's rerun state machine is deferred; all results are checked at the end.

    Raises:
        RuntimeError: at the end, what Megatron raises for a bad result with --rerun-mode disabled.
    """
    machine = get_rerun_state_machine()
    validate, deferred = machine.validate_result, []

    def defer(result: Any, **rules: Any) -> None:
        if isinstance(result, Tensor):
            result = result.detach().clone()  # Megatron divides the loss in place
        deferred.append((result, rules))

    machine.validate_result = defer
    try:
        yield
    finally:
        del machine.validate_result  # the class's own again
    results = _to_host([result for result, _ in deferred])
    for result, (_, rules) in zip(results, deferred):
        validate(result=result, **rules)


def _to_host(results: list[Any]) -> list[Any]:
    """The same list; tensors of one number each are copied from the GPU in one go."""
    tensors = [result for result in results if isinstance(result, Tensor)]
    if not tensors:
        return results
    copied = iter(torch.stack([tensor.double() for tensor in tensors]).cpu())
    return [next(copied) if isinstance(result, Tensor) else result for result in results]
