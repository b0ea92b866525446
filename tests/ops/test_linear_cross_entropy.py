"""The chunked loss of a linear head equals the plain one in float64, gradients included, on any number of ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.worlds import run_world

from yoco_megatron.ops.linear_cross_entropy import linear_cross_entropy

ROOT = Path(__file__).resolve().parents[2]
N, HIDDEN, VOCAB = 50, 12, 24


def inputs(dtype=torch.float64, scale=1.0):
    rng = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, HIDDEN, generator=rng, dtype=torch.float64) for n in (N, VOCAB))
    labels = torch.randint(0, VOCAB, (N,), generator=rng)
    dloss = torch.rand(N, generator=rng, dtype=torch.float64)
    dloss[::5] = 0.0  # as a loss mask does
    dloss = torch.stack((dloss, dloss.flip(0)))  # of the logarithms of the sums, too
    return (scale * x).to(dtype), weight.to(dtype), labels, dloss


def plain(x, weight, labels, dloss):
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = x @ weight.t()
    results = torch.stack((F.cross_entropy(logits, labels, reduction="none"), logits.logsumexp(1)))
    results.backward(dloss)
    return results.detach(), x.grad, weight.grad


def chunked(x, weight, labels, dloss, chunk_size, group=None):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    results = torch.stack(linear_cross_entropy(x, weight, labels, chunk_size, group))
    results.backward(dloss.to(results.dtype))
    return results.detach(), x.grad, weight.grad


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 64])
@pytest.mark.parametrize("scale", [1.0, 300.0])  # logits in the thousands: exponentials would overflow
def test_equals_the_plain_loss(chunk_size, scale):
    case = inputs(scale=scale)
    for got, want in zip(chunked(*case, chunk_size), plain(*case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_narrow_inputs(dtype, tolerance):
    """bf16: logits and their gradient are rounded to 2^-9 for the matrix products, sums are not."""
    case = inputs(dtype)
    results = chunked(*case, 16)
    assert results[0].dtype == torch.float32 and results[1].dtype == results[2].dtype == dtype
    for got, want in zip(results, plain(*case), strict=True):
        assert (got.double() - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_into_a_buffer(dtype, shared, monkeypatch):
    """The weight's gradient is added to `main_grad`, unrounded. Where another's gradient of the same weight is summed
    with what autograd gets, that is zeros; else the tensor is never read and stays uninitialised."""
    zeros = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *args, **more: zeros.append(args) or zeros_like(*args, **more))
    x, weight, labels, dloss = inputs(dtype)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    weight.zero_out_wgrad = shared
    before = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(2))
    buffer = before.clone()
    torch.stack(linear_cross_entropy(x, weight, labels, 16, main_grad=buffer)).backward(dloss.float())
    assert len(zeros) == shared and (not shared or weight.grad.count_nonzero() == 0)
    _, dx, dweight = plain(x.detach(), weight.detach(), labels, dloss)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert ((buffer - before).double() - dweight).norm() < tolerance * dweight.norm()
    assert (x.grad.double() - dx).norm() < tolerance * dx.norm()


def products_of_logits(monkeypatch) -> list[int]:
    """Gets the tokens of each product with the transposed weight."""
    made = []
    matmul = torch.Tensor.__matmul__

    def counting(a, b):
        if b.shape == (HIDDEN, VOCAB):
            made.append(len(a))
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counting)
    return made


@pytest.mark.parametrize(("chunk_size", "products"), [(64, [50]), (30, [25, 25, 25]), (20, [17, 17, 16, 17, 17])])
def test_the_last_chunks_logits_are_made_once(chunk_size, products, monkeypatch):
    """Chunks are of equal size, so that the last one is not tiny. A second backward recomputes its logits."""
    x, weight, labels, (dloss, _) = inputs()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    made = products_of_logits(monkeypatch)
    loss, _ = linear_cross_entropy(x, weight, labels, chunk_size)
    loss.backward(dloss, retain_graph=True)
    assert made == products
    first, x.grad, weight.grad = (x.grad, weight.grad), None, None
    loss.backward(dloss)
    assert all(map(torch.equal, first, (x.grad, weight.grad)))


COMPILE = """
import torch
from yoco_megatron.ops.linear_cross_entropy import linear_cross_entropy
from yoco_megatron.ops.linear_cross_entropy import torch as op

def run():
    x, w = x0.clone().requires_grad_(), w0.clone().requires_grad_()
    loss, _ = linear_cross_entropy(x, w, labels, 32)
    loss.sum().backward()
    return loss, x.grad, w.grad

x0, w0 = torch.randn(76, 64).bfloat16(), torch.randn(300, 64).bfloat16()  # the last chunk is shorter
labels = torch.randint(0, 300, (76,))
plain = run()
op._fused = lambda function, on_gpu: op._compiled(function)
for got, want in zip(run(), plain):
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-3)
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
assert graphs == 5, graphs
"""


@pytest.mark.slow
def test_compiled_as_on_a_gpu():
    """What lies between the products goes through torch.compile on a GPU; here inductor makes it for the CPU, in a
    process where the CPU stand-in has not switched compilation off. Two graphs of forward's function, for the first
    length and for any other; of backward's, which takes the last chunk first, one more for a chunk at offset zero."""
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_gradient_by_differences():
    x, weight, labels, _ = inputs()
    x, weight, labels = x[:5].requires_grad_(), weight.requires_grad_(), labels[:5]
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels, 2), (x, weight))


def on_ranks():
    x, weight, labels, dloss = inputs()
    entries = VOCAB // dist.get_world_size()
    part = weight[dist.get_rank() * entries :][:entries]
    loss, dx, dweight = chunked(x, part, labels, dloss, 7, dist.group.WORLD)
    dist.all_reduce(dx)
    return {"loss": loss, "dx": dx, "dweight": dweight}


@pytest.mark.parametrize("ranks", [2, 4])
def test_split_vocabulary(ranks):
    loss, dx, dweight = plain(*inputs())
    results = run_world(ranks, on_ranks)
    for result in results:
        torch.testing.assert_close(result["loss"], loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result["dx"], dx, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([r["dweight"] for r in results]), dweight, rtol=1e-10, atol=1e-10)


def test_memory_is_that_of_a_chunk(monkeypatch):
    """No tensor of N x V is ever made."""
    largest = 0
    real = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        result = real(a, b)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    chunked(*inputs(), 8)
    assert largest == 8 * VOCAB


def test_wrong_shapes_are_refused():
    x, weight, labels, _ = inputs()
    with pytest.raises(ValueError, match=r"labels \[N\]"):
        linear_cross_entropy(x, weight, labels[1:], 8)
    with pytest.raises(ValueError, match="main_grad"):
        linear_cross_entropy(x, weight, labels, 8, main_grad=x)
    with pytest.raises(ValueError, match="chunk_size"):
        linear_cross_entropy(x, weight, labels, 0)
