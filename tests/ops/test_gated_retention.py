"""Gated retention: every form equals the float64 token recurrence, in its results and in all its gradients.

Inputs are random with a fixed seed, decays have the mean gate logit that training visits (-4 forgets within
tokens, 8 remembers tens of thousands), and cotangents are put on the output and on the final state alike.
"""

import pytest
import torch
from torch import Tensor

from yoco_megatron.ops.gated_retention import (
    dispatch,
    gated_retention,
    log_decay_from_logits,
    resolve_backend,
)
from yoco_megatron.ops.gated_retention.chunk_state import state_update
from yoco_megatron.ops.gated_retention.reference import parallel, recurrent
from yoco_megatron.ops.gated_retention.torch import chunkwise, step

NAMES = ("q", "k", "v", "log_decay", "initial_state")


def make_inputs(
    seed: int, B=2, T=64, H=3, K=8, V=12, *, shared=None, dtype=torch.float64, gate_logit=0.0, state=True
) -> dict[str, Tensor | None]:
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    inputs = {
        "q": randn(B, T, shared or H, K).to(dtype),
        "k": randn(B, T, shared or H, K).to(dtype),
        "v": randn(B, T, H, V).to(dtype),
        "log_decay": log_decay_from_logits(gate_logit + randn(B, T, H)),
        "initial_state": randn(B, H, K, V) if state else None,
    }
    if dtype != torch.float64:
        inputs["log_decay"] = inputs["log_decay"].float()
        inputs["initial_state"] = inputs["initial_state"].float() if state else None
    return inputs


def run(form, inputs: dict[str, Tensor | None], **options) -> dict[str, Tensor]:
    """Output, final state and every input's gradient, with random cotangents on output and final state."""
    leaves = {n: None if x is None else x.detach().clone().requires_grad_() for n, x in inputs.items()}
    o, final = form(**leaves, **options)
    rng = torch.Generator().manual_seed(99)
    do = torch.randn(o.shape, generator=rng, dtype=torch.float64).to(o.device)
    dS = torch.randn(final.shape, generator=rng, dtype=torch.float64).to(o.device)
    ((o.double() * do).sum() + (final.double() * dS).sum()).backward()
    results = {"o": o.detach(), "final_state": final.detach()}
    return results | {"d" + n: x.grad for n, x in leaves.items() if x is not None}


def worst_head_error(got: Tensor, want: Tensor, head_dim: int) -> float:
    """Relative Frobenius error per head, worst head: a wrong head must not hide behind the others."""
    heads = (got.double() - want).movedim(head_dim, 0).flatten(1).norm(dim=1)
    return (heads / want.movedim(head_dim, 0).flatten(1).norm(dim=1)).max().item()


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float | dict[str, float]) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        head_dim = 1 if "state" in name else 2
        limit = tolerance if isinstance(tolerance, float) else tolerance[name]
        error = worst_head_error(got[name], expected, head_dim)
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}"  # nan fails too


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("gate_logit", [-4.0, 0.0, 4.0, 8.0])
def test_three_forms_agree_in_float64(T, gate_logit):
    inputs = make_inputs(T, T=T, gate_logit=gate_logit)
    want = run(recurrent, inputs)
    assert_close(run(parallel, inputs), want, 1e-10)
    assert_close(run(chunkwise, inputs, chunk_size=64), want, 1e-10)


def test_shared_keys_are_those_of_each_head():
    """Also in one step, and in what the state of a span becomes; heads that share are neighbours."""
    inputs = make_inputs(3, T=70, H=6, shared=2)
    ids = document_ids((20, 50), (69, 1))
    want = run(recurrent, inputs, document_ids=ids)
    assert_close(run(chunkwise, inputs, chunk_size=16, document_ids=ids), want, 1e-10)
    each = inputs | {name: inputs[name].repeat_interleave(3, 2) for name in ("q", "k")}
    assert_close({"o": want["o"]}, {"o": run(recurrent, each, document_ids=ids)["o"]}, 1e-12)
    v, log_decay, state = (inputs[name] for name in ("v", "log_decay", "initial_state"))
    of_token = [x[:, 0] for x in (inputs["q"], inputs["k"], v, log_decay)]
    of_each = [x[:, 0] for x in (each["q"], each["k"], v, log_decay)]
    for found, expected in zip(step(*of_token, state), step(*of_each, state)):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(
        state_update(inputs["k"], v, log_decay, ids), state_update(each["k"], v, log_decay, ids)
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 100, 128, 512])
@pytest.mark.parametrize("state", [True, False])
def test_chunk_size_does_not_change_the_result(chunk_size, state):
    inputs = make_inputs(chunk_size, T=100, H=5, K=12, V=6, state=state)
    assert_close(run(chunkwise, inputs, chunk_size=chunk_size), run(recurrent, inputs), 1e-10)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_scale_multiplies_the_keys(scale):
    inputs = make_inputs(5)
    want = run(recurrent, inputs, scale=scale)
    assert_close(run(parallel, inputs, scale=scale), want, 1e-10)
    assert_close(run(chunkwise, inputs, scale=scale, chunk_size=16), want, 1e-10)
    scaled_by_hand = inputs | {"k": inputs["k"] * scale}
    torch.testing.assert_close(chunkwise(**scaled_by_hand, scale=1.0)[0], want["o"], rtol=1e-10, atol=1e-10)


# Documents that end on, just before and just after a chunk's edge, several in one chunk, one longer than chunks.
LENGTHS = {"edges": (16, 15, 2, 16, 31, 20), "short": (1, 1, 3, 2, 5, 88), "one": (100,)}


def document_ids(*rows: tuple[int, ...]) -> Tensor:
    """int32 [B, T] from the lengths of each row's documents."""
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in rows]).int()


@pytest.mark.parametrize("rows", [("edges", "short"), ("short", "one"), ("edges", "edges")])
@pytest.mark.parametrize("form", [recurrent, parallel, chunkwise])
def test_documents_are_separate_sequences(form, rows):
    inputs = make_inputs(3, T=100)
    options = dict(chunk_size=16) if form is chunkwise else {}
    got = run(form, inputs, document_ids=document_ids(*(LENGTHS[r] for r in rows)), **options)
    want = {name: torch.zeros_like(x) for name, x in got.items()}
    rng = torch.Generator().manual_seed(99)
    do = torch.randn(got["o"].shape, generator=rng, dtype=torch.float64)
    dS = torch.randn(got["final_state"].shape, generator=rng, dtype=torch.float64)
    for row, lengths in enumerate(LENGTHS[r] for r in rows):
        first = 0
        for length in lengths:
            part, last = slice(first, first + length), first + length == 100
            leaves = {n: x[row : row + 1] if "state" in n else x[row : row + 1, part] for n, x in inputs.items()}
            leaves = {n: x.clone().requires_grad_() for n, x in leaves.items()}
            o, final = recurrent(**leaves | ({} if first == 0 else {"initial_state": None}))
            loss = (o * do[row : row + 1, part]).sum() + (final * dS[row : row + 1]).sum() * last
            loss.backward()
            want["o"][row, part] = o[0].detach()
            if last:
                want["final_state"][row] = final[0].detach()
            for name in ("q", "k", "v", "log_decay"):
                want["d" + name][row, part] = leaves[name].grad[0]
            if first == 0:
                want["dinitial_state"][row] = leaves["initial_state"].grad[0]
            else:
                want["dlog_decay"][row, first] = 0.0  # nothing to decay into a document's first token
            first += length
    assert_close(got, want, 1e-10)


def test_documents_do_not_leak_one_bit():
    """Another document's values do not even change a rounding; without ids they change everything behind them."""
    ids = document_ids(LENGTHS["edges"], LENGTHS["short"])
    inputs = make_inputs(4, T=100, dtype=torch.float32)
    other = make_inputs(5, T=100, dtype=torch.float32, gate_logit=4.0)
    here = (ids == 2)[..., None]
    changed = {
        n: x if "state" in n else torch.where(here if x.ndim == 3 else here[..., None], other[n], x)
        for n, x in inputs.items()
    }
    rest = ~(ids == 2)
    for masked in (True, False):
        a, b = (run(chunkwise, x, chunk_size=16, document_ids=ids if masked else None) for x in (inputs, changed))
        same = all(torch.equal(a[n][rest], b[n][rest]) for n in ("o", "dq", "dk", "dv", "dlog_decay"))
        assert same == masked


@pytest.mark.parametrize("gate_logit", [-4.0, 0.0, 4.0, 8.0])
def test_float32(gate_logit):
    # 1e-5: a few hundred float32 roundings (6e-8 each) of sums that cancel little.
    inputs = make_inputs(11, T=300, K=16, V=24, dtype=torch.float32, gate_logit=gate_logit)
    got = run(chunkwise, inputs)
    assert got["o"].dtype == got["final_state"].dtype == got["dq"].dtype == torch.float32
    assert_close(got, run(recurrent, inputs), 1e-5)


@pytest.mark.parametrize("gate_logit", [-4.0, 0.0, 4.0, 8.0])
def test_bfloat16_inputs(gate_logit):
    # The reference reads the same rounded q, k, v, and all arithmetic is float32: what is left is the one
    # rounding of o and of the gradients to bfloat16 (half an ulp is 2^-9 = 2e-3 of a value, 1.7e-3 in the
    # mean), twice for a gradient, whose cotangent is rounded on its way in. Neither concerns the final state. The
    # decay's gradient is a sum of terms that cancel, so the rounded cotangent weighs more in it.
    inputs = make_inputs(12, T=300, K=16, V=24, dtype=torch.bfloat16, gate_logit=gate_logit)
    got = run(chunkwise, inputs)
    assert got["o"].dtype == got["dq"].dtype == got["dk"].dtype == got["dv"].dtype == torch.bfloat16
    assert got["final_state"].dtype == got["dlog_decay"].dtype == got["dinitial_state"].dtype == torch.float32
    tolerance = dict.fromkeys(("o", "dq", "dk", "dv"), 3e-3) | {"final_state": 1e-5}
    tolerance |= {"dlog_decay": 1e-2, "dinitial_state": 3e-3}
    assert_close(got, run(recurrent, inputs), tolerance)


def test_carried_state_makes_two_calls_one():
    inputs = make_inputs(21, T=150, gate_logit=2.0)
    want = run(recurrent, inputs)

    def two_calls(initial_state, **sequence):
        cut = 70  # inside a chunk of the one-call form
        first = {n: x[:, :cut] for n, x in sequence.items()}
        second = {n: x[:, cut:] for n, x in sequence.items()}
        o1, state = chunkwise(**first, initial_state=initial_state, chunk_size=32)
        o2, state = chunkwise(**second, initial_state=state, chunk_size=32)
        return torch.cat([o1, o2], dim=1), state

    assert_close(run(two_calls, inputs), want, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_step_is_the_recurrence(dtype):
    inputs = make_inputs(31, T=40, dtype=dtype, gate_logit=4.0)
    want_o, want_state = recurrent(**inputs)
    state, o = inputs["initial_state"], []
    for t in range(40):
        o_t, state = step(*(inputs[n][:, t] for n in NAMES[:4]), state)
        o.append(o_t)
    assert o[0].dtype == dtype and state.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-3}[dtype]
    assert worst_head_error(torch.stack(o, dim=1), want_o, 2) < limit
    assert worst_head_error(state, want_state, 1) < min(limit, 1e-5)


def test_step_without_a_state_starts_from_zero():
    inputs = make_inputs(32, T=1, state=False)
    o, state = step(*(inputs[n][:, 0] for n in NAMES[:4]), None)
    want_o, want_state = recurrent(**inputs)
    torch.testing.assert_close((o, state), (want_o[:, 0], want_state))


def test_strided_views_of_one_fused_projection():
    B, T, H, D = 2, 45, 3, 8
    rng = torch.Generator().manual_seed(41)
    fused = torch.randn(B, T, H, 4 * D, generator=rng, dtype=torch.float64, requires_grad=True)
    log_decay = log_decay_from_logits(torch.randn(B, H, T, generator=rng, dtype=torch.float64)).transpose(1, 2)
    q, k, v, _ = fused.split(D, dim=-1)
    assert not q.is_contiguous() and not log_decay.is_contiguous()
    grads = []
    for form in (chunkwise, recurrent):
        o, _ = form(q, k, v, log_decay)
        grads.append((o, *torch.autograd.grad(o.square().sum(), fused)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


def test_gradcheck():
    inputs = make_inputs(51, B=1, T=5, H=2, K=3, V=2)
    leaves = tuple(x.requires_grad_() for x in inputs.values())

    def form(q, k, v, g, s):
        return chunkwise(q, k, v, g, initial_state=s, chunk_size=2)

    assert torch.autograd.gradcheck(form, leaves)


def test_decay_matters_by_a_known_amount():
    # One key written at t=0 and read at t: the answer is exp(sum of the decays after t=0), nothing else.
    T, K = 70, 4
    k = torch.zeros(1, T, 1, K, dtype=torch.float64)
    k[:, 0] = 1.0
    q, v = torch.ones_like(k), torch.ones_like(k)
    log_decay = torch.full((1, T, 1), -0.1, dtype=torch.float64)
    want = K * torch.exp(-0.1 * torch.arange(T, dtype=torch.float64))
    for form in (recurrent, parallel, chunkwise):
        o, state = form(q, k, v, log_decay, scale=1.0)
        torch.testing.assert_close(o[0, :, 0, 0], want)
        torch.testing.assert_close(state[0, 0, 0, 0], want[-1] / K)


def test_padding_neither_writes_nor_decays():
    # T = 65 with chunks of 64 pads 63 tokens; the state must be the one after token 65.
    inputs = make_inputs(61, T=65, gate_logit=-4.0)
    _, state = chunkwise(**inputs, chunk_size=64)
    torch.testing.assert_close(state, recurrent(**inputs)[1], rtol=1e-12, atol=1e-12)


def test_future_tokens_do_not_reach_the_past():
    inputs = make_inputs(62, T=100)
    changed = {n: x.clone() for n, x in inputs.items()}
    for n in NAMES[:4]:
        changed[n][:, 50:] = changed[n][:, 50:] * 2.0
    before, after = chunkwise(**inputs, chunk_size=32)[0], chunkwise(**changed, chunk_size=32)[0]
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.allclose(before[:, 50:], after[:, 50:])


def test_extreme_decays_stay_finite():
    # exp(b_j - b_m) above the diagonal would be exp(+3000): masking after the exponential gives inf and nan.
    inputs = make_inputs(63, T=64, dtype=torch.float32)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], -50.0)
    got = run(chunkwise, inputs)
    assert all(x.isfinite().all() for x in got.values())
    assert_close({"o": got["o"]}, {"o": run(recurrent, inputs)["o"]}, 1e-5)


def test_memory_saved_for_backward_is_linear_in_length():
    def saved_elements(T):
        inputs = make_inputs(64, B=1, T=T, H=1)
        total = 0

        def count(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            chunkwise(**{n: x.requires_grad_() for n, x in inputs.items()}, chunk_size=16)
        return total

    assert saved_elements(1024) < 2.1 * saved_elements(512)


def test_log_decay_from_logits():
    logits = torch.tensor([-200.0, -4.0, 0.0, 4.0, 200.0])
    want = torch.nn.functional.logsigmoid(logits.double()) / 16
    torch.testing.assert_close(log_decay_from_logits(logits), want.float())
    torch.testing.assert_close(log_decay_from_logits(logits.double(), temperature=4.0), want * 4)
    assert log_decay_from_logits(logits.bfloat16()).dtype == torch.float32
    assert log_decay_from_logits(logits.double()).dtype == torch.float64
    # Zero logit, the mean at initialisation: a half-life of exactly 16 tokens.
    assert torch.exp(16 * log_decay_from_logits(torch.zeros(()))).item() == pytest.approx(0.5)


WHERE = {"device": "cpu", "dtype": torch.float32, "key_dim": 64, "value_dim": 64}


def test_dispatch_runs_the_named_backend():
    inputs = make_inputs(71)
    want = chunkwise(**inputs, chunk_size=32)
    for backend in ("auto", "torch"):
        torch.testing.assert_close(gated_retention(**inputs, chunk_size=32, backend=backend), want, rtol=0, atol=0)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"--retention-backend cuda .*torch"):
        resolve_backend("cuda", **WHERE)


def test_registered_backend_is_preferred_and_its_reason_is_told(monkeypatch):
    fast = dispatch.Backend(
        "fast", lambda device, dtype, K, V: None if K == 128 else f"head width {K} is not 128", None
    )
    monkeypatch.setattr(dispatch, "BACKENDS", [fast, *dispatch.BACKENDS])
    assert dispatch.explain(**WHERE) == {
        "fast": "head width 64 is not 128",
        "triton": "needs a CUDA GPU",
        "torch": None,
    }
    assert resolve_backend("auto", **WHERE).name == "torch"
    assert resolve_backend("auto", **(WHERE | {"key_dim": 128})) is fast
    with pytest.raises(ValueError, match=r"--retention-backend fast .*head width 64 is not 128"):
        resolve_backend("fast", **WHERE)
    with pytest.raises(ValueError, match=r"--retention-backend auto .*floating point"):
        resolve_backend("auto", **(WHERE | {"dtype": torch.int32}))


@pytest.mark.parametrize("form", [gated_retention, chunkwise, recurrent])
def test_wrong_layouts_are_refused(form):
    inputs = make_inputs(81, B=2, T=5, H=3, K=4, V=6)
    for name, wrong in {
        "k": inputs["k"][..., :3],
        "v": inputs["v"].transpose(1, 2),  # heads first
        "log_decay": inputs["log_decay"].transpose(1, 2),
        "initial_state": inputs["initial_state"].transpose(2, 3),
    }.items():
        with pytest.raises(ValueError, match=name):
            form(**(inputs | {name: wrong}))


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size"):
        chunkwise(**make_inputs(82), chunk_size=0)


@pytest.mark.parametrize(("heads", "chunks"), [(192, 64), (24, 512), (3, 512), (24, 64), (1, 1), (1, 100_000)])
def test_segments_fill_the_gpu(heads, chunks):
    """Enough heads need no segments; few heads get as many as pay, never shorter than the minimum."""
    tuning = pytest.importorskip("yoco_megatron.ops.gated_retention.tuning")
    segments = tuning.num_segments(heads, chunks, (2, 6), 1, 132)
    assert (segments == 1) == (heads >= 192 or chunks < 16)
    assert segments == 1 or chunks // segments >= tuning.MIN_SEGMENT_CHUNKS


def test_wide_heads_count_every_tile_of_their_states():
    """A state of 256 x 256 is four programs' work, so segments that would pay for one program may not pay for four."""
    tuning = pytest.importorskip("yoco_megatron.ops.gated_retention.tuning")
    wide, usual = (tuning.config_for("segment", width, torch.bfloat16).tiles(width, width) for width in (256, 128))
    assert (wide, usual) == (4, 1)
    of = {tiles: tuning.num_segments(6, 128, (4, 12), tiles, 132) for tiles in (wide, usual)}
    assert 1 < of[wide] < of[usual]
