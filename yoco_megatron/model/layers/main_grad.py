"""The buffer in which Megatron sums a weight's gradients, for layers that add to it themselves."""

import torch
from torch import Tensor


def claim_main_grad(weight: Tensor) -> Tensor | None:
    """`weight.main_grad`, claimed: Megatron's gradient hook then ignores the gradient that autograd gets.

    None where Megatron has made none, or no gradient will come.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or not torch.is_grad_enabled():
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return buffer
