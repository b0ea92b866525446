"""The decoding kernel against attention written out in float64, in Triton's interpreter or on a GPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so the test runs in a process of its own. The interpreter
multiplies bfloat16 wrongly, so that is for the GPU.
"""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import itertools
import torch
from yoco_megatron.ops.attention.decode import BlockTable, append, decode_attention, offset_of
from yoco_megatron.ops.attention.quantized import pack, unpack
device = "cuda" if torch.cuda.is_available() and "{device}" == "cuda" else "cpu"
generator = torch.Generator().manual_seed(0)
draw = lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(device, dtype)
SHAPES = ((2, 6, 2, 32, 128), (1, 4, 4, 16, 64), (3, 8, 1, 64, 64), (1, 40, 2, 16, 192))
dtypes = ((torch.float32, 1e-5), (torch.bfloat16, 1e-2))[: 1 + (device == "cuda")]
for kind, (dtype, tolerance) in itertools.product((None, "int8", "fp8"), dtypes):
    for B, H, G, D, capacity in SHAPES if kind is None or device == "cuda" else SHAPES[:1]:
        held = lambda x: pack(x, kind) if kind else x
        read = lambda x: (unpack(x, kind, torch.float32) if kind else x).double()  # what is held is exact
        blocks = [tuple(held(draw(B, G, capacity, D, dtype=dtype)) for _ in range(2)) for _ in range(3)]
        W = blocks[0][0].shape[-1]
        base = blocks[1][1]
        offsets = [torch.tensor([offset_of(pair[i], base) for pair in blocks], device=device) for i in (0, 1)]
        table = BlockTable(base, *offsets, capacity, G * capacity * W, capacity * W, kind)
        keys, values = (read(torch.cat([pair[i] for pair in blocks], dim=2)) for i in (0, 1))
        for length in (1, 65, capacity, capacity + 1, 3 * capacity):
            k, v = held(draw(B, G, D, dtype=dtype)), held(draw(B, G, D, dtype=dtype))
            position = torch.tensor([length - 1], device=device)
            append(k, v, table, position)
            keys[:, :, length - 1], values[:, :, length - 1] = read(k), read(v)
            q = draw(B, H, D, dtype=dtype)
            of_head = [h * G // H for h in range(H)]
            scores = torch.einsum("bhd,bhtd->bht", q.double(), keys[:, of_head, :length]) * D**-0.5
            wanted = torch.einsum("bht,bhtd->bhd", scores.softmax(-1), values[:, of_head, :length])
            for splits in (1, 8):
                found = decode_attention(q, table, position + 1, G, D**-0.5, splits)
                error = ((found.double() - wanted).norm() / wanted.norm()).item()
                assert error < tolerance, (dtype, kind, B, H, G, D, capacity, length, splits, error)
print("all equal")
"""


def run(device: str, **environment: str) -> None:
    command = [sys.executable, "-c", SCRIPT.replace("{device}", device)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stderr[-3000:]


def test_in_the_interpreter():
    run("cpu", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
def test_on_the_gpu():
    run("cuda")
