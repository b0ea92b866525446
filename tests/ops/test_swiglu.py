"""The kernels of SwiGLU and its gradient, in Triton's interpreter, against float64, in float32: 1e-6."""

import pytest
import torch
from support.interpreter import INTERPRETED, run_interpreted
from support.swiglu import SHAPES, check_gradient

pytest.importorskip("triton")


def test_in_the_interpreter() -> None:
    run_interpreted(__file__, len(SHAPES))


if INTERPRETED:

    @pytest.mark.parametrize("shape", SHAPES)
    def test_gradient(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        from yoco_megatron.ops.fused import swiglu_triton

        check_gradient(swiglu_triton.swiglu, shape, torch.float32, 1e-6)
