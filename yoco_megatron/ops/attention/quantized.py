"""K,V of one byte a value: a token's head is its values and, behind them, their scale.

    x [..., D]  ->  bytes [..., D + 4]:  x / s rounded to int8 or FP8 (e4m3), then s = max |x| / the largest value, fp32

What cuts, joins or copies K,V by tokens does so with these bytes, too. Relative errors of normally distributed heads of
128: int8 0.7%, FP8 2.6%, bf16 itself 0.17% (tests/ops/test_quantized.py).
"""

import torch
from torch import Tensor

FORMATS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Name -> dtype of the values and the largest of them."""
SCALE_BYTES = 4


def check(kind: str | None) -> None:
    """Raises ValueError for a format that the kernels cannot read on this machine's GPU."""
    if kind == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        major, minor = torch.cuda.get_device_capability()
        raise ValueError(
            f"--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or later, and this one has {major}.{minor}: "
            "use int8"
        )


def pack(x: Tensor, kind: str) -> Tensor:
    """Floating point [..., D] -> uint8 [..., D + 4], as one of `FORMATS`."""
    dtype, largest = FORMATS[kind]
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / largest
    values = x / scale.clamp(min=torch.finfo(torch.float32).tiny)
    if not dtype.is_floating_point:
        values = values.round()
    values = values.clamp(-largest, largest).to(dtype)  # beyond the largest one, FP8 is NaN
    return torch.cat((values.view(torch.uint8), scale.view(torch.uint8)), dim=-1)


def unpack(packed: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """uint8 [..., D + 4] of `pack` -> [..., D] in `dtype`."""
    values, scale = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
    return (values.contiguous().view(FORMATS[kind][0]).float() * scale.view(torch.float32)).to(dtype)
