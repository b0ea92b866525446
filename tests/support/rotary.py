"""Rotation of pairs against float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from support.models import relative_error
from support.retention_mixer import rotate_pairs
from yoco_megatron import runtime

# [S, B, H, D], and whether each sample has its own angles.
CASES = [((7, 2, 3, 16), False), ((5, 3, 4, 64), True), ((9, 1, 24, 128), False), ((3, 2, 1, 256), True)]


def check_rotation(
    rotate: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int, int, int],
    of_samples: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Output and gradient, relative to their norms, of half of a projection's columns, by random angles."""
    S, B, H, D = shape
    device = runtime.device()
    whole = torch.randn(S, B, 2 * H * D, device=device, dtype=dtype)
    x = whole[..., : H * D].unflatten(-1, (H, D)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    angles = torch.randn(S, B if of_samples else 1, 1, D // 2, device=device).mul_(30).repeat_interleave(2, -1)
    want = rotate_pairs(exact, angles.double().cos(), angles.double().sin())
    y = rotate(x, angles)
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy.double())
    assert y.shape == shape and y.dtype == x.grad.dtype == dtype
    assert relative_error(y, want) < tolerance
    assert relative_error(x.grad, exact.grad) < tolerance
