"""A function of tensors that is computed again in backward, where its inputs take less memory than what it stores."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None, **constants: Any) -> Tensor:
    """function(*inputs, **constants), differentiable in all inputs; torch compiles it on a GPU, into one kernel or few.

    It may read no other tensor that needs a gradient, and draws no random numbers. A function of a module, which lives
    as long as this one: it is compiled once.
    """
    return _Recomputed.apply(function, constants, *inputs)


def fused(function: Callable[..., Tensor], on_gpu: bool) -> Callable[..., Tensor]:
    """The function as `recomputed` runs it."""
    return _compiled(function) if on_gpu else function


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, constants, *inputs):
        ctx.function = functools.partial(fused(function, inputs[0].is_cuda), **constants)
        ctx.save_for_backward(*inputs)
        return ctx.function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        _, _, *needs = ctx.needs_input_grad
        inputs: list[Any] = [
            x if x is None else x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needs)
        ]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        found = iter(torch.autograd.grad(output, [x for x, need in zip(inputs, needs) if need], gradient))
        return None, None, *(next(found) if need else None for need in needs)
