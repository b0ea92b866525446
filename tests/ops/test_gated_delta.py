"""The gated delta rule in chunks is the float64 token recurrence, in results and all gradients; so is transformers'."""

import pytest
import torch
import torch.nn.functional as F
from ops.test_gated_retention import LENGTHS, assert_close, document_ids, run
from torch import Tensor

from yoco_megatron.ops.gated_delta import gated_delta, resolve_backend, step
from yoco_megatron.ops.gated_delta.chunk_state import state_gradient, state_update
from yoco_megatron.ops.gated_delta.reference import recurrent
from yoco_megatron.ops.gated_delta.torch import chunkwise


def make_inputs(seed: int, B=2, T=100, H=3, K=8, V=12, *, dtype=torch.float64, state=True) -> dict[str, Tensor | None]:
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs = {
        "q": F.normalize(randn(B, T, H, K), dim=-1),
        "k": F.normalize(randn(B, T, H, K), dim=-1),
        "v": randn(B, T, H, V),
        "log_decay": F.logsigmoid(2 + randn(B, T, H)),
        "beta": torch.sigmoid(1 + randn(B, T, H)),
    }
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    return inputs | {"initial_state": randn(B, H, K, V) if state else None}


@pytest.mark.parametrize(("T", "state"), [(1, True), (63, True), (64, False), (65, True), (200, True), (200, False)])
def test_chunks_are_the_recurrence(T, state):
    inputs = make_inputs(T, T=T, state=state)
    assert_close(run(chunkwise, inputs), run(recurrent, inputs), 1e-10)
    assert_close(run(chunkwise, inputs, scale=0.3), run(recurrent, inputs, scale=0.3), 1e-10)


@pytest.mark.parametrize("rows", [("edges", "short"), ("one", "edges")])
def test_documents(rows):
    """The recurrence forgets at each start; so do chunks, one of which holds several documents."""
    ids = document_ids(*(LENGTHS[row] for row in rows))
    inputs = make_inputs(3)
    assert_close(run(chunkwise, inputs, document_ids=ids), run(recurrent, inputs, document_ids=ids), 1e-10)
    alone = {name: x[:1, :16] if x.shape[1] == 100 else x[:1] for name, x in inputs.items()}
    if rows[0] == "edges":
        first = recurrent(**alone)[0]
        torch.testing.assert_close(recurrent(**inputs, document_ids=ids)[0][:1, :16], first, rtol=1e-12, atol=1e-12)


def test_float32_and_bfloat16():
    """A few roundings of 6e-8 for each of 100 tokens; bfloat16 rounds inputs and outputs alone, to 4e-3."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        inputs = make_inputs(5, dtype=dtype)
        got, want = run(chunkwise, inputs), run(recurrent, inputs)
        assert got["o"].dtype == dtype and got["final_state"].dtype == torch.float32
        assert_close(got, want, tolerance)


def test_steps_are_the_recurrence():
    inputs = make_inputs(7, T=9)
    want, final = recurrent(**inputs)
    state = inputs.pop("initial_state")
    for t in range(9):
        o, state = step(*(x[:, t] for x in inputs.values()), state)
        torch.testing.assert_close(o, want[:, t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


def test_equals_transformers():
    """Qwen3-Next's, which is fp32."""
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    inputs = make_inputs(11, T=130)
    q, k, v, g, beta, state = (x.float() for x in inputs.values())
    o, final = modeling.torch_chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    want, want_final = recurrent(**inputs)
    assert_close({"o": o, "final_state": final}, {"o": want, "final_state": want_final}, 2e-6)


@pytest.mark.parametrize("ids", [None, document_ids(LENGTHS["edges"], LENGTHS["one"])], ids=["one", "documents"])
def test_what_a_span_does_to_the_state(ids):
    """The state after it is M S + w; the gradient of S is that of autograd."""
    inputs = make_inputs(13)
    *inputs, state = inputs.values()
    state.requires_grad_()
    o, final = recurrent(*inputs, state, document_ids=ids)
    w, M = state_update(gated_delta, *inputs[1:], ids)
    torch.testing.assert_close(M @ state + w, final, rtol=1e-10, atol=1e-10)
    do = torch.randn_like(o)
    (want,) = torch.autograd.grad(o, state, do)
    torch.testing.assert_close(state_gradient(gated_delta, do, *inputs, ids), want, rtol=1e-10, atol=1e-10)


def test_bad_input():
    inputs = make_inputs(1)
    with pytest.raises(ValueError, match="needs beta of shape"):
        chunkwise(**inputs | {"beta": inputs["beta"][:, :5]})
    sizes = dict(device="cpu", dtype=torch.float32, key_dim=8, value_dim=8)
    with pytest.raises(ValueError, match="--gated-delta-backend fla cannot run here: needs a CUDA GPU"):
        resolve_backend("fla", **sizes)
    with pytest.raises(ValueError, match="--gated-delta-backend triton is unknown; choose one of auto, fla, torch"):
        resolve_backend("triton", **sizes)
    assert resolve_backend("auto", **sizes).name == "torch"
