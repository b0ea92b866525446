"""Mamba-2 on a GPU: retention's kernels where heads share keys, and bf16 layers against float32 torch.

Tolerances of the kernels are those of test_retention_kernels.py, twice as much for dq and dk, which are sums of rounded
values over the heads that share them; 5e-2 for the gradient of decays, which are those of Mamba-2.
"""

import pytest
import torch
import torch.nn.functional as F
from gpu.test_retention_kernels import BF16 as KERNEL_BF16
from gpu.test_retention_kernels import FP32 as KERNEL_FP32
from gpu.test_retention_kernels import results, worst_head
from ops.test_gated_retention import document_ids
from support.models import BF16, FULL_RECOMPUTE, TE, WIDE_HEADS, assert_close, plain_name, relative_error, train_step
from support.pipeline import pipeline_step
from support.worlds import run_world

from yoco_megatron.ops.gated_retention.torch import chunkwise
from yoco_megatron.ops.gated_retention.triton import gated_retention as kernel
from yoco_megatron.ops.short_convolution import short_convolution
from yoco_megatron.ops.short_convolution.reference import recurrent as convolve

pytestmark = pytest.mark.gpu
LOSS, GRAD = 5e-3, 6e-2
MAMBA2 = WIDE_HEADS | dict(mamba_num_heads=8, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=2)
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])


@DOCUMENTS
@pytest.mark.parametrize("segments", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("T", "H", "groups", "N", "P"), [(700, 18, 2, 128, 64), (300, 4, 1, 64, 64), (130, 6, 6, 16, 64)]
)
def test_kernels_where_heads_share_keys(T, H, groups, N, P, dtype, segments, documents) -> None:
    """q and k as views of one convolution's output, as the layer makes them."""
    B = 2
    of_groups = torch.randn(T, B, groups, H // groups * P + 2 * N, device="cuda").to(dtype)
    _, k, q = (x.transpose(0, 1) for x in of_groups.split((H // groups * P, N, N), dim=-1))
    dt = F.softplus(torch.randn(B, T, H, device="cuda") - 4)
    inputs = {
        "q": q,
        "k": k,
        "v": (torch.randn(B, T, H, P, device="cuda") * dt[..., None]).to(dtype),
        "log_decay": -torch.linspace(1, 16, H, device="cuda") * dt,
        "initial_state": torch.randn(B, H, N, P, device="cuda"),
    }
    cotangents = torch.randn(B, T, H, P, device="cuda").to(dtype), torch.randn(B, H, N, P, device="cuda")
    ids = document_ids((T - 100, 1, 63, 36), (64, 64, T - 128)).cuda() if documents else None
    got = results(kernel, inputs, cotangents, document_ids=ids, segments=segments, scale=1.0)
    wide = {name: x.double() for name, x in inputs.items()}
    want = results(chunkwise, wide, cotangents, document_ids=ids, scale=1.0, chunk_size=64)
    limits = dict(KERNEL_FP32 if dtype == torch.float32 else KERNEL_BF16)
    limits |= {name: 2 * limits[name] for name in ("dq", "dk")}
    limits["dlog_decay"] = 1e-3 if dtype == torch.float32 else 5e-2
    errors = {name: worst_head(got[name], want[name], 1 if name in ("final", "dinitial_state") else 2) for name in got}
    print(" ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert not {name: error for name, error in errors.items() if not error <= limits[name]}


@DOCUMENTS
def test_compiled_convolution(documents: bool) -> None:
    """bf16: the output is rounded once, gradients are sums of rounded cotangents."""
    x, weight, bias = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((2, 300, 96), (96, 4), (96,)))
    ids = document_ids((200, 1, 63, 36), (64, 64, 172)).cuda() if documents else None
    found = []
    for form, dtype in ((short_convolution, torch.bfloat16), (convolve, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y, _ = form(*leaves, document_ids=ids)
        y.backward(x.flip(1).to(y.dtype))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*found):
        assert relative_error(ours, exact) < 2**-7


@DOCUMENTS
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(
    "recompute", [{}, FULL_RECOMPUTE, dict(recompute_elementwise=True)], ids=["plain", "recompute full", "elementwise"]
)
def test_bf16_equals_float32_torch(recompute: dict, backend: str, documents: bool, one_process) -> None:
    exact = MAMBA2 | dict(self_decoder="MS", retention_backend="torch")
    steps = [exact, exact | BF16 | TE | recompute | dict(retention_backend=backend)]
    results = [train_step(step, documents=documents) for step in steps]
    reference, result = (
        {plain_name(name): value for name, value in each.items() if "weight/" not in name} for each in results
    )
    assert_close(result, reference, LOSS, GRAD)


@DOCUMENTS
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("mesh", [dict(cp=2), dict(tp=2)], ids=["CP2", "TP2 SP"])
def test_two_gpus(mesh: dict, documents: bool) -> None:
    """bf16 on two GPUs equals float32 on one."""
    model = MAMBA2 | dict(self_decoder="MSMS")
    (reference,) = run_world(1, pipeline_step, model, None, False, 2, False, documents)
    split = model | BF16 | TE | (dict(sequence_parallel=True) if "tp" in mesh else {})
    for result in run_world(2, pipeline_step, split, None, False, 2, False, documents, **mesh):
        assert_close({plain_name(name): value for name, value in result.items()}, reference, LOSS, GRAD)
