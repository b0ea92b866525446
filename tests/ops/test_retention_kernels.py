"""The very kernels of the GPU, in Triton's interpreter: equal to the float64 recurrence, gradients included.

float32 only (the interpreter multiplies bfloat16 wrongly), so errors are float32 rounding: 1e-5 as for the torch path,
measured 1e-7 to 5e-7.
bf16, speed and the compiler are the business of tests/gpu/test_retention_kernels.py.
"""

from math import log

import pytest
import torch
from support.interpreter import INTERPRETED, run_interpreted

pytest.importorskip("triton")


def test_in_the_interpreter():
    run_interpreted(__file__, len(CASES) + len(MIXERS) + len(FORGETTING) + 7)


if INTERPRETED:
    from ops.test_gated_retention import assert_close, document_ids, make_inputs, run
    from support.retention_mixer import mix

    from yoco_megatron.ops.fused.retention_mixer import mix as fused_mix
    from yoco_megatron.ops.gated_retention import gated_retention, log_decay_from_logits, resolve_backend
    from yoco_megatron.ops.gated_retention import step as dispatched_step
    from yoco_megatron.ops.gated_retention import triton as op
    from yoco_megatron.ops.gated_retention.reference import recurrent
    from yoco_megatron.ops.gated_retention.torch import step as plain_step
    from yoco_megatron.ops.gated_retention.triton import gated_retention as kernel
    from yoco_megatron.ops.gated_retention.triton import step

TOLERANCE = 1e-5
EDGES, SHORT = (64, 63, 2, 64, 7), (1, 1, 3, 2, 5, 188)
# name: (shape, gate logit, initial state, documents of two rows, segments)
CASES = {
    "one token": (dict(T=1, K=16, V=16), 0.0, True, None, None),
    "one chunk": (dict(T=64, K=16, V=32), 0.0, True, None, None),
    "a tail": (dict(T=130, K=32, V=16), 4.0, True, None, None),
    "fast decay": (dict(T=130, K=16, V=16), -40.0, False, None, None),
    "slow decay": (dict(T=700, B=1, K=16, V=16), 8.0, False, None, None),
    "several slices": (dict(T=70, B=1, H=1, K=64, V=128), 0.0, True, None, None),
    "anchors": (dict(T=1100, B=1, H=2, K=16, V=16), 0.0, True, None, None),
    "segments": (dict(T=300, H=1, K=16, V=16), 4.0, True, None, 3),
    "documents": (dict(T=200, H=1, K=16, V=16), 0.0, True, (EDGES, SHORT), None),
    "documents and segments": (dict(T=200, H=1, K=16, V=16), 4.0, True, (EDGES, SHORT), 3),
    "shared keys": (dict(T=130, H=4, shared=2, K=32, V=16), 0.0, True, ((*EDGES[:3], 1), (100, 30)), 2),
    "documents and anchors": (dict(T=1100, B=1, H=1, K=16, V=16), 4.0, True, ((500, 12, 1, 587),), None),
}
MIXERS = {"plain": {}, "documents": {"documents": True}, "angles of each sample": {"sample_angles": True}}
# Segments whose beginning no longer counts at their end, (seed, documents of the one row). They are 6, 6 and 4 chunks.
FORGETTING = [(0, None), (1, None), (3, (200, 300, 500)), (5, (64, 640, 100, 196))]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_equals_the_recurrence(case):
    shape, gate_logit, state, documents, segments = CASES[case]
    inputs = make_inputs(len(case), **shape, gate_logit=gate_logit, state=state, dtype=torch.float32)
    ids = document_ids(*documents) if documents else None
    torch.utils.deterministic.fill_uninitialized_memory = True  # with the line below: every torch.empty is NaN
    torch.use_deterministic_algorithms(True)
    try:
        got = run(kernel, inputs, document_ids=ids, segments=segments)
    finally:
        torch.use_deterministic_algorithms(False)
    want = run(recurrent, inputs, document_ids=ids)
    if gate_logit < -8:  # exp(-2.5) a token: what is left of the decay's gradient is smaller than its rounding
        got.pop("dlog_decay"), want.pop("dlog_decay")
    assert_close(got, want, TOLERANCE)


def uneven_decay(seed, T):
    """[1, T, 3]: a head that forgets within four chunks, one that remembers all, and one that does either by chunk."""
    rng = torch.Generator().manual_seed(seed)
    by_chunk = torch.where(torch.rand(-(-T // 64), generator=rng) < 0.4, -40.0, 12.0).repeat_interleave(64)[:T]
    logits = torch.stack([torch.full((T,), -1.5), torch.full((T,), 8.0), by_chunk], 1)[None]
    return log_decay_from_logits(logits + torch.randn(1, T, 3, generator=rng))


@interpreted
@pytest.mark.parametrize(("seed", "documents"), FORGETTING)
def test_segments_forget_their_beginning(seed, documents):
    """One chunk too few shows where decay jumps: between slow chunks all of it is left."""
    inputs = make_inputs(seed, T=1000, B=1, K=16, V=16, dtype=torch.float32)
    inputs["log_decay"] = uneven_decay(seed, 1000)
    ids = document_ids(documents) if documents else None
    got, want = run(kernel, inputs, document_ids=ids, segments=3), run(recurrent, inputs, document_ids=ids)
    assert_close(got, want, TOLERANCE)


@interpreted
@pytest.mark.parametrize("reverse", [False, True])
def test_negligible_chunks_are_not_read(reverse):
    """A head loses 13 bits a chunk, so 4 of a segment's chunks are above 2^-40; another head loses nothing.

    NaN shows what is read: in the first head nothing beyond these four chunks, in the fourth and in the other head all.
    """
    T, H, heads = 1100, 2, torch.arange(2)  # three segments of 6 chunks
    y, z = (torch.randn(1, T, H, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    launch = op.plan(y, z, None, None, 3)
    sums = op.decay_sums(torch.where(heads == 0, -13 * log(2) / 64, 0.0).expand(1, T, H), None, launch)
    at = torch.arange(T) % launch.segment
    distance = at if reverse else launch.segment - 1 - at  # from where the state leaves the segment

    def states(where, filling):
        poisoned = torch.where(where[:, None, None], torch.tensor(filling), y)
        return op.entering_states(poisoned, z, sums, None, None, launch, reverse=reverse)[:, 1:]

    negligible = distance >= 4 * 64
    clean, poisoned = states(negligible, 0.0), states(negligible, float("nan"))
    assert clean.abs().amax((2, 3)).min() > 0
    assert torch.equal(poisoned[0], clean[0])
    assert poisoned[1].isnan().all()
    assert states(distance // 64 == 3, float("nan")).isnan().all()


@interpreted
def test_documents_do_not_leak_one_bit():
    ids = document_ids(EDGES, SHORT)
    shape = dict(T=200, H=1, K=16, V=16, dtype=torch.float32)
    inputs, other = make_inputs(4, **shape), make_inputs(5, **shape, gate_logit=4.0)
    there = (ids == 2)[..., None]
    changed = {
        n: x if "state" in n else torch.where(there if x.ndim == 3 else there[..., None], other[n], x)
        for n, x in inputs.items()
    }
    for masked in (True, False):
        a, b = (run(kernel, x, document_ids=ids if masked else None) for x in (inputs, changed))
        same = all(torch.equal(a[n][ids != 2], b[n][ids != 2]) for n in ("o", "dq", "dk", "dv", "dlog_decay"))
        assert same == masked


@interpreted
def test_strided_views_of_one_buffer():
    """q, k and v of a fused projection [T, B, H, 3, D], as the model cuts them."""
    whole = torch.randn(100, 2, 3, 3, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = (x.transpose(0, 1) for x in whole.unbind(3))
    log_decay = make_inputs(1, T=100)["log_decay"].float()
    inputs = dict(q=q, k=k, v=v, log_decay=log_decay, initial_state=None)
    got = kernel(**inputs)
    torch.testing.assert_close(got[0].double(), recurrent(**inputs)[0], rtol=1e-5, atol=1e-5)


@interpreted
def test_it_is_the_first_choice_and_equals_the_dispatcher():
    inputs = make_inputs(2, T=65, K=16, V=16, dtype=torch.float32)
    chosen = resolve_backend("auto", device="cpu", dtype=torch.float32, key_dim=16, value_dim=16)
    assert chosen.name == "triton"
    assert torch.equal(gated_retention(**inputs)[0], kernel(**inputs)[0])


@interpreted
def test_scale_must_be_positive():
    with pytest.raises(ValueError, match="scale > 0"):
        kernel(**make_inputs(2, T=3, K=16, V=16, dtype=torch.float32), scale=0.0)


@interpreted
@pytest.mark.parametrize("case", MIXERS)
def test_fused_mixer_equals_its_parts(case):
    """Output and gradients of both ways to rotate; the parts run in float64, so 1e-5 as above."""
    S, B, H, D = 70, 2, 3, 16
    rng = torch.Generator().manual_seed(3)
    qkvg, dy = torch.randn(S, B, H * 4 * D, generator=rng), torch.randn(S, B, H * D, generator=rng)
    logits = torch.randn(S, B, H, generator=rng)
    angles = torch.rand(S, B if "angles" in case else 1, 1, D // 2, generator=rng).repeat_interleave(2, -1) * 6
    options = dict(tau=16.0, eps=1e-5, document_ids=document_ids((40, 30), (1, 69)) if "documents" in case else None)

    def gradients(form, dtype, **more):
        x, g = qkvg.to(dtype, copy=True).requires_grad_(), logits.to(dtype, copy=True).requires_grad_()
        y = form(x, g, angles.to(dtype), **options, **more)
        y.backward(dy.to(dtype))
        return y.detach(), x.grad, g.grad

    want = gradients(mix, torch.float64)
    for in_place in (True, False):
        for got, expected in zip(gradients(fused_mix, torch.float32, in_place=in_place), want, strict=True):
            assert (got - expected).norm() / expected.norm() < 1e-5
    recompute_fns: list = []
    y = fused_mix(qkvg.clone().requires_grad_(), logits, angles, **options, recompute_fns=recompute_fns)
    again = torch.full_like(y, float("nan"))
    recompute_fns[0](again)
    assert torch.equal(again, y)


@interpreted
def test_one_token_steps():
    rng = torch.Generator().manual_seed(4)
    state = torch.randn(2, 3, 16, 32, generator=rng)
    q, k, v = (torch.randn(2, 3, n, generator=rng) for n in (16, 16, 32))
    log_decay = -torch.rand(2, 3, generator=rng)
    for start in (None, state):
        for got, want in zip(step(q, k, v, log_decay, start), plain_step(q, k, v, log_decay, start), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    chosen, kernel = dispatched_step(q, k, v, log_decay, state), step(q, k, v, log_decay, state)
    assert all(torch.equal(a, b) for a, b in zip(chosen, kernel, strict=True))
    q.requires_grad_()
    assert dispatched_step(q, k, v, log_decay, state)[0].requires_grad, "gradients need the torch path"
    _, new = step(q.detach(), k, v, log_decay, state, in_place=True)
    assert new is state
