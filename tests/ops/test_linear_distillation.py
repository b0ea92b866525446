"""Cross entropy and divergence from a teacher in chunks equal the plain ones in float64, gradients included, on any
number of ranks; padding of the teacher's vocabulary has no probability."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.worlds import run_world

from yoco_megatron.ops.linear_cross_entropy import linear_distillation

N, HIDDEN, OF_TEACHER, VOCAB, ENTRIES = 29, 12, 20, 24, 21


def inputs(dtype=torch.float64, scale=1.0, seed=1):
    rng = torch.Generator().manual_seed(seed)
    shapes = (N, HIDDEN), (VOCAB, HIDDEN), (N, OF_TEACHER), (VOCAB, OF_TEACHER)
    x, weight, teacher_x, teacher_weight = (torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes)
    labels = torch.randint(0, ENTRIES, (N,), generator=rng)
    dce, dkl = torch.rand(2, N, generator=rng, dtype=torch.float64)
    dce[::5] = dkl[::5] = 0.0  # as a loss mask does
    models = [tensor.to(dtype) for tensor in (scale * x, weight, scale * teacher_x, teacher_weight)]
    return *models, labels, dce, dkl


def plain(x, weight, teacher_x, teacher_weight, labels, dce, dkl, temperature):
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits, teacher = x @ weight.t(), teacher_x.double() @ teacher_weight.double().t()
    ce = F.cross_entropy(logits, labels, reduction="none")
    p = F.softmax(teacher[:, :ENTRIES] / temperature, 1)
    q = F.log_softmax(logits / temperature, 1)[:, :ENTRIES]
    kl = temperature**2 * F.kl_div(q, p, reduction="none").sum(1)
    torch.autograd.backward((ce, kl), (dce, dkl))
    return ce.detach(), kl.detach(), x.grad, weight.grad


def chunked(x, weight, teacher_x, teacher_weight, labels, dce, dkl, temperature, chunk_size, group=None):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    ce, kl = linear_distillation(
        x, weight, labels, teacher_x, teacher_weight, temperature, chunk_size, group, teacher_entries=ENTRIES
    )
    torch.autograd.backward((ce, kl), (dce.to(ce.dtype), dkl.to(kl.dtype)))
    return ce.detach(), kl.detach(), x.grad, weight.grad


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("scale", [1.0, 300.0])  # logits in the thousands: exponentials would overflow
def test_equals_the_plain_losses(chunk_size, temperature, scale):
    case = inputs(scale=scale)
    for got, want in zip(chunked(*case, temperature, chunk_size), plain(*case, temperature), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_narrow_inputs(dtype, tolerance):
    """bf16: logits and their gradient are rounded to 2^-9, that of the divergence on top of that of cross entropy."""
    case = inputs(dtype)
    results = chunked(*case, 2.0, 16)
    assert results[0].dtype == results[1].dtype == torch.float32 and results[2].dtype == results[3].dtype == dtype
    for got, want in zip(results, plain(*case, 2.0), strict=True):
        assert (got.double() - want).norm() < tolerance * want.norm()


def test_no_divergence_from_itself():
    x, weight, _, _, labels, *_ = inputs()
    _, kl = linear_distillation(x, weight, labels, x, weight, 1.5, 8)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-12)


def test_gradient_into_a_buffer():
    """Once a micro-batch, and again where a second backward recomputes the last chunk."""
    x, weight, *teacher, labels, dce, dkl = inputs()
    buffer = torch.zeros_like(weight)
    x, leaf = x.requires_grad_(), weight.clone().requires_grad_()
    losses = linear_distillation(x, leaf, labels, *teacher, 2.0, 8, main_grad=buffer, teacher_entries=ENTRIES)
    want = plain(x.detach(), weight, *teacher, labels, dce, dkl, 2.0)[3]
    for times in (1, 2):
        torch.autograd.backward(losses, (dce, dkl), retain_graph=True)
        torch.testing.assert_close(buffer, times * want, rtol=1e-10, atol=1e-10)


def on_ranks():
    x, weight, teacher_x, teacher_weight, *rest = inputs()
    entries = VOCAB // dist.get_world_size()
    weight, teacher_weight = (whole[dist.get_rank() * entries :][:entries] for whole in (weight, teacher_weight))
    *losses, dx, dweight = chunked(x, weight, teacher_x, teacher_weight, *rest, 1.5, 7, dist.group.WORLD)
    dist.all_reduce(dx)
    return *losses, dx, dweight


@pytest.mark.parametrize("ranks", [2, 8])  # of 8 the last one has padding alone
def test_split_vocabulary(ranks):
    *want, dweight = plain(*inputs(), 1.5)
    results = run_world(ranks, on_ranks)
    for result in results:
        for got, one in zip(result, want):
            torch.testing.assert_close(got, one, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([result[3] for result in results]), dweight, rtol=1e-10, atol=1e-10)


def test_memory_is_that_of_a_chunk(monkeypatch):
    largest = 0
    real = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        result = real(a, b)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    chunked(*inputs(), 1.0, 8)
    assert largest == 8 * VOCAB


def test_wrong_shapes_are_refused():
    x, weight, teacher_x, teacher_weight, labels, *_ = inputs()
    with pytest.raises(ValueError, match="teacher's x"):
        linear_distillation(x, weight, labels, teacher_x[1:], teacher_weight, 1.0, 8)
    with pytest.raises(ValueError, match="teacher's x"):
        linear_distillation(x, weight, labels, teacher_x, teacher_weight[1:], 1.0, 8)
