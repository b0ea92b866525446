"""The kernel of the rotary embedding, in Triton's interpreter, against float64, in float32: 1e-6."""

import pytest
import torch
from support.interpreter import INTERPRETED, run_interpreted
from support.rotary import CASES, check_rotation

pytest.importorskip("triton")


def test_in_the_interpreter() -> None:
    run_interpreted(__file__, len(CASES))


if INTERPRETED:

    @pytest.mark.parametrize(("shape", "of_samples"), CASES)
    def test_rotation(shape: tuple[int, int, int, int], of_samples: bool) -> None:
        from yoco_megatron.ops.fused.rotary import rotate

        check_rotation(rotate, shape, of_samples, torch.float32, 1e-6)
