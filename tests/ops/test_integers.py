"""The host's whole numbers are Triton's."""

import pytest

from yoco_megatron.ops.integers import cdiv, next_power_of_2


def test_equal_tritons() -> None:
    triton = pytest.importorskip("triton")
    for n in range(1, 300):
        assert next_power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, m) for m in range(1, 70)] == [triton.cdiv(n, m) for m in range(1, 70)]
