"""The retention kernels on the device: accuracy against float64 at every kind of shape that ships, and determinism.

The compiler is under test as well: Triton up to 3.7 miscompiles some patterns on Hopper, so no shape is trusted that
was not compared here. Every torch.empty holds NaN, so what no program wrote shows.

Tolerances (relative Frobenius norm, worst head). bf16: operands are rounded to 2^-9, twice along each result: 5e-3,
3e-3 for states, which are averages; the decay's gradient is a difference of nearly equal sums: 1.5e-2. float32 inputs
(three tf32 products each): 1e-5, and ten times that for the decay's gradient.
"""

import pytest
import torch
from support.retention_mixer import mix

from yoco_megatron.ops.fused.retention_mixer import mix as fused_mix
from yoco_megatron.ops.gated_retention import gated_retention, log_decay_from_logits, resolve_backend
from yoco_megatron.ops.gated_retention.torch import chunkwise
from yoco_megatron.ops.gated_retention.torch import step as plain_step
from yoco_megatron.ops.gated_retention.triton import step

pytestmark = pytest.mark.gpu
BF16 = dict.fromkeys(("o", "dq", "dk", "dv"), 5e-3) | {"dlog_decay": 1.5e-2, "final": 3e-3, "dinitial_state": 3e-3}
FP32 = dict.fromkeys(BF16, 1e-5) | {"dlog_decay": 1e-4}


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def fused_views(B, T, H, K, V, dtype):
    """q, k, v as views of one projection [T, B, H, 2K + V], as the model makes them."""
    fused = torch.randn(T, B, H, 2 * K + V, device="cuda").to(dtype)
    return (x.transpose(0, 1) for x in fused.split((K, K, V), dim=-1))


def results(form, inputs, cotangents, **options):
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    o, final = form(**leaves, **options)
    do, dS = cotangents
    torch.autograd.backward([o, final], [do.to(o.dtype), dS.to(final.dtype)])
    grads = {"d" + n: x.grad for n, x in leaves.items() if x is not None}
    return {"o": o.detach(), "final": final.detach()} | grads


def worst_head(got, want, head_dim):
    heads = (got.double() - want.double()).movedim(head_dim, 0).flatten(1).norm(dim=1)
    return (heads / want.double().movedim(head_dim, 0).flatten(1).norm(dim=1)).max().item()


def check(B, T, H, K, V, mu, dtype=torch.bfloat16, state=True, documents=None, segments=None):
    q, k, v = fused_views(B, T, H, K, V, dtype)
    log_decay = log_decay_from_logits(torch.randn(B, T, H, device="cuda") + torch.tensor(mu, device="cuda"))
    start = torch.randn(B, H, K, V, device="cuda") if state else None
    inputs = dict(q=q, k=k, v=v, log_decay=log_decay, initial_state=start)
    cotangents = torch.randn(B, T, H, V, device="cuda").to(dtype), torch.randn(B, H, K, V, device="cuda")
    ids = None
    if documents:
        starts = torch.zeros(B, T, device="cuda", dtype=torch.int32)
        starts[:, list(documents)] = 1
        ids = starts.cumsum(1).int()
    from yoco_megatron.ops.gated_retention.triton import gated_retention as kernel

    got = results(kernel, inputs, cotangents, document_ids=ids, segments=segments)
    wide = {n: None if x is None else x.double() for n, x in inputs.items()}
    want = results(chunkwise, wide, cotangents, document_ids=ids, chunk_size=64)
    limits = FP32 if dtype == torch.float32 else BF16
    if T == 1:  # two numbers a head, each the difference of two
        limits = limits | {"dlog_decay": 0.2}
    errors = {n: worst_head(got[n], want[n], 1 if n in ("final", "dinitial_state") else 2) for n in got}
    print(f"{B}x{T} H{H} {K}x{V} mu {mu} {str(dtype)[6:]} seg {segments} docs {bool(documents)}: ", end="")
    print(" ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    wrong = {n: e for n, e in errors.items() if not e <= limits[n]}
    assert not wrong, wrong


@pytest.mark.parametrize("mu", [-4.0, 0.0, 4.0, 8.0])
@pytest.mark.parametrize("dim", [16, 32, 64, 128, 256])
def test_decays(dim, mu):
    check(1, 4096, 3, dim, dim, mu)


@pytest.mark.parametrize("T", [1, 64, 1000, 4095])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (64, 128), (128, 64), (256, 128)])
def test_lengths_and_widths(T, K, V):
    check(2, T, 3, K, V, 2.0)


@pytest.mark.parametrize("mu", [-4.0, 0.0, 4.0, 8.0])
def test_long_sequence_in_segments(mu):
    check(1, 65536, 2, 128, 128, mu)


MIXED = (-4.0, 0.0, 2.0, 8.0)  # mean gate logits of four heads: 2, 9, 39 and all chunks count at a segment's end


@pytest.mark.parametrize("documents", [None, (3000, 5450, 9000, 9920, 16000)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_segments_forget_their_beginning(dim, documents):
    """3 segments of 5,504 tokens; documents begin in the middle of each, and in the last chunk of the first."""
    check(1, 16384 + 77, 4, dim, dim, MIXED, documents=documents, segments=3)


@pytest.mark.parametrize("documents", [None, (1000, 2500)])
def test_segments_forget_nothing_that_float32_keeps(documents):
    check(1, 4096, 4, 128, 128, MIXED, torch.float32, documents=documents, segments=3)


@pytest.mark.parametrize("segments", [1, 2, 8, 13])
def test_segments(segments):
    check(1, 4096 + 77, 3, 128, 128, 4.0, segments=segments)


@pytest.mark.parametrize("segments", [1, 5])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_documents(dim, segments):
    check(2, 3000, 3, dim, dim, 4.0, documents=(64, 127, 128, 129, 1000, 1001, 1024, 2048, 2999), segments=segments)


@pytest.mark.parametrize("dim", [64, 128])
def test_without_states(dim):
    check(3, 2048, 5, dim, dim, 0.0, state=False)


@pytest.mark.parametrize(("dim", "documents", "segments"), [(64, (100, 192), 1), (128, None, 3), (128, (64,), 1)])
def test_float32(dim, documents, segments):
    check(1, 700, 3, dim, dim, 2.0, torch.float32, documents=documents, segments=segments)


@pytest.mark.parametrize("dim", [128, 256])
def test_ten_runs_give_the_same_bits(dim):
    q, k, v = fused_views(2, 4096, 8, dim, dim, torch.bfloat16)
    log_decay = log_decay_from_logits(torch.randn(2, 4096, 8, device="cuda"))
    inputs = dict(q=q, k=k, v=v, log_decay=log_decay, initial_state=None)
    do = torch.randn(2, 4096, 8, dim, device="cuda").bfloat16(), torch.randn(2, 8, dim, dim, device="cuda")
    first = results(gated_retention, inputs, do)
    for _ in range(9):
        again = results(gated_retention, inputs, do)
        assert all(torch.equal(first[n], again[n]) for n in first)


def test_it_is_the_models_default():
    chosen = resolve_backend("auto", device="cuda", dtype=torch.bfloat16, key_dim=128, value_dim=128)
    assert chosen.name == "triton"


def test_documents_do_not_leak_one_bit():
    ids = torch.tensor([100, 300, 1, 63, 1000]).cuda()
    ids = torch.arange(5, device="cuda").repeat_interleave(ids)[None].int()
    shape = (1, ids.shape[1], 2, 128, 128, torch.bfloat16)
    q, k, v = (x.clone() for x in fused_views(*shape))
    log_decay = log_decay_from_logits(torch.randn(1, ids.shape[1], 2, device="cuda"))
    inputs = dict(q=q, k=k, v=v, log_decay=log_decay, initial_state=None)
    do = torch.randn_like(v), torch.randn(1, 2, 128, 128, device="cuda")
    there = (ids == 1)[..., None]
    other = {
        n: x if x is None else torch.where(there if x.ndim == 3 else there[..., None], x * 0.7, x)
        for n, x in inputs.items()
    }
    for masked in (True, False):
        a, b = (results(gated_retention, x, do, document_ids=ids if masked else None) for x in (inputs, other))
        rest = ids != 1
        assert masked == all(torch.equal(a[n][rest], b[n][rest]) for n in ("o", "dq", "dk", "dv", "dlog_decay"))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(("H", "D", "documents"), [(24, 128, False), (3, 128, True), (6, 256, True), (5, 64, False)])
def test_fused_mixer(H, D, documents, in_place):
    """The whole mixer against its parts in float64; 8e-3, because o and its gradient are rounded once more,
    and 2e-2 for the gate logits, whose gradient is rounded to bfloat16 at last.

    Keys resemble queries: at a document's first token o is (q . k) v, and with q . k near 0 its norm blows up noise.
    """
    S, B = 1000, 2
    qkvg = torch.randn(S, B, H, 4, D, device="cuda")
    qkvg[..., 1, :] = qkvg[..., 0, :] + 0.5 * qkvg[..., 1, :]
    qkvg = qkvg.flatten(2).bfloat16()
    logits = torch.randn(S, B, H, device="cuda").bfloat16() + 2
    angles = (torch.rand(S, 1, 1, D // 2, device="cuda") * 6).repeat_interleave(2, -1)
    dy = torch.randn(S, B, H * D, device="cuda").bfloat16()
    ids = (torch.arange(S, device="cuda") // 300)[None].expand(B, -1).int() if documents else None
    options = dict(tau=16.0, eps=1e-5, document_ids=ids)

    def gradients(form, dtype, **more):
        x, g = qkvg.to(dtype, copy=True).requires_grad_(), logits.to(dtype, copy=True).requires_grad_()
        y = form(x, g, angles.to(torch.float64 if dtype == torch.float64 else torch.float32), **options, **more)
        y.backward(dy.to(dtype))
        heads = (n.unflatten(2, (H, -1)) for n in (y.detach(), x.grad))
        return dict(zip(("y", "dqkvg", "dlogits"), (*heads, g.grad)))

    want, got = gradients(mix, torch.float64), gradients(fused_mix, torch.bfloat16, in_place=in_place)
    errors = {n: worst_head(got[n], want[n], 2) for n in want}
    print(f"mixer H{H} D{D}", " ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    assert errors["y"] < 8e-3 and errors["dqkvg"] < 8e-3 and errors["dlogits"] < 2e-2, errors


def test_one_token_steps():
    q, k, v = (torch.randn(3, 24, 128, device="cuda").bfloat16() for _ in range(3))
    log_decay, state = -torch.rand(3, 24, device="cuda"), torch.randn(3, 24, 128, 128, device="cuda")
    for start in (None, state):
        want = plain_step(q.double(), k.double(), v.double(), log_decay, start)
        got = step(q, k, v, log_decay, start)
        assert worst_head(got[0], want[0], 1) < 3e-3
        assert worst_head(got[1], want[1], 1) < 1e-6
