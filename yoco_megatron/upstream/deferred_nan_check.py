"""Megatron's checks for NaN and Inf, asked of the GPU once a step.

Megatron asks twice for every bucket of gradients, where these are reduced while backward runs, and twice for every
micro-batch's loss. Each time the processor waits for the GPU, which then waits for new work. Here the results are kept
where they are, and all are checked together when the step's backward has ended, before the optimizer, by the same
rules, in the same order, with the same messages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor


@contextmanager
def validation_at_the_end() -> Iterator[None]:
    """Inside, `validate_result` of Megatron's rerun state machine puts tensors off; they are validated at the end.

    Raises:
        RuntimeError: at the end, what Megatron raises for a bad result with --rerun-mode disabled.
    """
    machine = get_rerun_state_machine()
    validate, waiting = machine.validate_result, []

    def later(result: Any, **rules: Any) -> None:
        if isinstance(result, Tensor):
            result = result.detach().clone()  # Megatron divides the loss in place
        waiting.append((result, rules))

    machine.validate_result = later
    try:
        yield
    finally:
        del machine.validate_result  # the class's own again
    results = _on_the_processor([result for result, _ in waiting])
    for result, (_, rules) in zip(results, waiting):
        validate(result=result, **rules)


def _on_the_processor(results: list[Any]) -> list[Any]:
    """The same list, with the tensors of one number each copied from the GPU at once."""
    tensors = [result for result in results if isinstance(result, Tensor)]
    if not tensors:
        return results
    copied = iter(torch.stack([tensor.double() for tensor in tensors]).cpu())
    return [next(copied) if isinstance(result, Tensor) else result for result in results]
