"""flash-linear-attention's kernels against the float64 recurrence, and gated DeltaNet in bf16 against float32 torch.

The kernels multiply 16-bit values and keep states in fp32: 2e-2 of a head's norm for outputs and gradients (roundings
of 2^-9 in a few products one after another), 5e-2 for those of decays and betas, small differences of large sums.
"""

import pytest
import torch
from ops.test_gated_delta import make_inputs
from ops.test_gated_retention import assert_close, document_ids, run
from support.models import BF16, FULL_RECOMPUTE, TE, WIDE_HEADS, plain_name, train_step
from support.models import assert_close as assert_step
from support.pipeline import pipeline_step
from support.worlds import run_world

from yoco_megatron.ops.gated_delta import gated_delta
from yoco_megatron.ops.gated_delta.chunk_state import state_gradient, state_update
from yoco_megatron.ops.gated_delta.reference import recurrent

pytestmark = pytest.mark.gpu
LOSS, GRAD = 5e-3, 6e-2
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])


def fla(*inputs: torch.Tensor, **options):
    return gated_delta(*inputs, **options, backend="fla")


def on_gpu(documents: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Inputs of 300 tokens, and their documents."""
    pytest.importorskip("fla")
    inputs = {name: x.cuda().float() for name, x in make_inputs(3, T=300, K=64, V=64).items()}
    inputs |= {name: inputs[name].bfloat16() for name in "qkv"}
    return inputs, document_ids((200, 1, 63, 36), (64, 64, 172)).cuda() if documents else None


@DOCUMENTS
def test_kernels_are_the_recurrence(documents: bool) -> None:
    inputs, ids = on_gpu(documents)
    got = run(lambda **x: fla(*x.values(), document_ids=ids), {n: x for n, x in inputs.items() if "state" not in n})
    want = run(recurrent, {n: x for n, x in inputs.items() if "state" not in n}, document_ids=ids)
    assert_close(got, want, {name: 5e-2 if name in ("dlog_decay", "dbeta") else 2e-2 for name in want})


@DOCUMENTS
def test_states_between_spans(documents: bool) -> None:
    """From an initial state: the state after it, by the kernel and by M S + w; the gradient of it."""
    inputs, ids = on_gpu(documents)
    *inputs, state = inputs.values()
    o, want = recurrent(*inputs, state.requires_grad_(), document_ids=ids)
    do = torch.randn_like(o)
    (want_gradient,) = torch.autograd.grad(o, state, do)
    w, M = state_update(fla, *inputs[1:], ids)
    found = {
        "state of the kernel": fla(*inputs, initial_state=state, document_ids=ids)[1],
        "state by the matrix": M @ state + w,
        "state gradient": state_gradient(fla, do.bfloat16(), *inputs, ids),
    }
    assert_close(found, dict(zip(found, (want, want, want_gradient))), 2e-2)


@DOCUMENTS
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=["plain", "recompute full"])
def test_bf16_equals_float32_torch(recompute: dict, backend: str, documents: bool, one_process) -> None:
    model = dict(self_decoder="GS", gated_delta_backend=backend, **WIDE_HEADS)
    steps = [dict(self_decoder="GS", **WIDE_HEADS), model | BF16 | TE | recompute]
    results = [train_step(step, documents=documents) for step in steps]
    reference, result = (
        {plain_name(name): value for name, value in each.items() if "weight/" not in name} for each in results
    )
    assert_step(result, reference, LOSS, GRAD)


@DOCUMENTS
@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("path", [{}, BF16 | TE], ids=["float32 torch", "bf16 transformer engine"])
def test_context_parallelism(path: dict, documents: bool) -> None:
    """Two GPUs equal one in float32."""
    model = WIDE_HEADS | dict(self_decoder="GRGS")
    (reference,) = run_world(1, pipeline_step, model, None, False, 2, False, documents)
    for result in run_world(2, pipeline_step, model | path, None, False, 2, False, documents, cp=2):
        limits = (LOSS, GRAD) if path else (1e-5, 1e-4)
        assert_step({plain_name(name): value for name, value in result.items()}, reference, *limits)
