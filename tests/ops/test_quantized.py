"""K,V in one byte a value: how far they are from what was packed."""

import pytest
import torch
from support.models import relative_error

from yoco_megatron.ops.attention.quantized import FORMATS, SCALE_BYTES, check, pack, unpack

# Half a step of max / 127; three bits behind the first one, or half of the smallest number of FP8, max / 448 / 2^9.
BOUNDS = {
    "int8": lambda x, most: torch.full_like(x, 0.5) * most / 127,
    "fp8": lambda x, most: torch.maximum(x.abs() / 16, most / 448 / 2**10),
}
MEAN_ERROR = {"int8": 0.007, "fp8": 0.027}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors(kind: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = (torch.randn(3, 4, 50, 128, generator=generator) * torch.randn(3, 4, 50, 1, generator=generator).exp()).to(
        dtype
    )
    packed = pack(x, kind)
    assert packed.shape == (3, 4, 50, 128 + SCALE_BYTES) and packed.dtype is torch.uint8
    back = unpack(packed, kind, torch.float32)
    x = x.float()
    assert ((back - x).abs() <= 1.001 * BOUNDS[kind](x, x.abs().amax(-1, keepdim=True))).all()
    assert MEAN_ERROR[kind] / 1.2 < relative_error(back, x) < MEAN_ERROR[kind]
    some = unpack(packed[:, 1:3, 7:9], kind, dtype)
    assert some.dtype is dtype and torch.equal(some, back[:, 1:3, 7:9].to(dtype)), "tokens and heads are cut freely"


def test_a_gpu_that_cannot_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    check("int8")
    check(None)
    with pytest.raises(ValueError, match=r"--kv-cache-dtype fp8 needs .* this one has 8\.0: use int8"):
        check("fp8")


@pytest.mark.parametrize("kind", FORMATS)
def test_extremes(kind: str) -> None:
    x = torch.tensor([[0.0, 0.0], [3e38, -3e38], [1e-30, 0.0], [-5.0, 5.0]])
    assert torch.allclose(unpack(pack(x, kind), kind, torch.float32), x, rtol=1e-6, atol=0)
    assert unpack(pack(torch.tensor([1.0, torch.nan]), kind), kind, torch.float32).isnan().any()
