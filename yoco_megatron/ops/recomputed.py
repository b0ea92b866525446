"""A function of tensors that is computed again in backward, where its inputs take less memory than what it stores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """function(*inputs), differentiable in all inputs. It may read no other tensor that needs a gradient, and draws no
    random numbers."""
    return _Recomputed.apply(function, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        _, *needs = ctx.needs_input_grad
        inputs: list[Any] = [
            x if x is None else x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, needs)
        ]
        with torch.enable_grad():
            output = ctx.function(*inputs)
        found = iter(torch.autograd.grad(output, [x for x, need in zip(inputs, needs) if need], gradient))
        return None, *(next(found) if need else None for need in needs)
