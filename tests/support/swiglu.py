"""SwiGLU's gradient against float64."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from support.models import relative_error
from yoco_megatron import runtime

# [s, b, F]: widths that fill no block, one, and more.
SHAPES = [(5, 2, 96), (3, 1, 1024), (2, 3, 1100), (1, 1, 8192)]


def check_gradient(
    swiglu: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    """Output and gradient of fresh random values, relative to their norms."""
    *rows, width = shape
    wide = torch.randn(*rows, 2 * width, device=runtime.device(), dtype=dtype).requires_grad_()
    exact = wide.detach().double().requires_grad_()
    y = swiglu(wide)
    gate, up = exact.chunk(2, -1)
    want = F.silu(gate) * up
    dy = torch.randn_like(y)
    y.backward(dy)
    want.backward(dy.double())
    assert y.shape == want.shape and y.dtype == wide.grad.dtype == dtype
    assert relative_error(y, want) < tolerance
    assert relative_error(wide.grad, exact.grad) < tolerance
