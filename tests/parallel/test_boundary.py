"""A boundary tensor restores what was joined, gradients too; the gradient of the K,V is the sum over their readers; the
communicator expects what Megatron's schedules send."""

import pytest
import torch
from support.models import relative_error

from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedKVReader
from yoco_megatron.parallel.pipeline.boundary import join_boundary_tensor, kv_values, split_boundary_tensor
from yoco_megatron.parallel.pipeline.communicator import arriving_stages

S, B, H, G, D = 12, 2, 10, 3, 4


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("sets", [1, 3])
def test_splitting_inverts_joining(tp: int, fp32: bool, sets: int, generator: torch.Generator) -> None:
    hidden = torch.randn(S // tp, B, H, generator=generator).bfloat16().requires_grad_()
    kv_sets = torch.randn(sets, S, B, G, 2, D, generator=generator).unbind()
    kv_sets = [(kv if fp32 else kv.bfloat16()).requires_grad_() for kv in kv_sets]
    boundary_tensor = join_boundary_tensor(hidden, kv_sets, fp32)
    assert boundary_tensor.dtype == torch.bfloat16
    assert boundary_tensor.shape == (1, B, S // tp * H + sets * kv_values((S, G, 2, D), fp32))
    assert boundary_tensor._base is None  # Megatron frees its storage after sending
    # The next stage gets a copy, as over the wire.
    received = boundary_tensor.detach().clone().requires_grad_()
    hidden_out, kv_out = split_boundary_tensor(received, hidden.shape, [(S, B, G, 2, D)] * sets, fp32)
    assert torch.equal(hidden_out, hidden)
    assert torch.equal(torch.stack(kv_out), torch.stack(kv_sets))
    assert all(kv.is_contiguous() for kv in kv_out)
    grad_hidden = torch.randn(hidden.shape, generator=generator).bfloat16()
    grad_kv = [torch.randn(kv.shape, generator=generator).to(kv.dtype) for kv in kv_sets]
    torch.autograd.backward((hidden_out, *kv_out), (grad_hidden, *grad_kv))
    boundary_tensor.backward(received.grad)
    assert torch.equal(hidden.grad, grad_hidden)
    for kv, gradient in zip(kv_sets, grad_kv):
        assert torch.equal(kv.grad, gradient), "the K,V's gradient was rounded on its way"


def readers(kv: torch.Tensor, hidden: torch.Tensor, layers: int, weight: torch.Tensor, through) -> torch.Tensor:
    """A stand-in for a cross-decoder: each layer reads keys and values in its own way, on top of the hidden states."""
    for layer in range(layers):
        key, value = through()
        hidden = hidden + torch.tanh(hidden * weight[layer]) * (key * value).sum((1, 2, 3))[:, None] + key.mean()
    return hidden


@pytest.mark.parametrize("layers", [0, 1, 5])
def test_gradient_is_the_sum_over_readers(layers: int, generator: torch.Generator) -> None:
    kv = torch.randn(S, B, G, 2, D, dtype=torch.float64, generator=generator).requires_grad_()
    start = torch.randn(S, H, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(5, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(
        readers(kv, start, layers, weight, lambda: kv.unbind(3)).square().sum() + (kv**3).sum(), (kv, start)
    )
    for _ in range(2):  # a second micro-batch starts from nothing
        hidden, reader = SharedKVReader.enter(start, kv, kv.dtype)
        out = readers(kv, hidden, layers, weight, reader.read)
        ours = torch.autograd.grad(out.square().sum() + (reader.read_stacked() ** 3).sum(), (kv, start))
        for value, reference in zip(ours, expected):
            assert relative_error(value, reference) < 1e-12


def test_bf16_gradients_are_summed_in_fp32(generator: torch.Generator) -> None:
    """64 readers of bf16 K,V: one rounding in the end, not one per reader."""
    kv = torch.randn(S, B, G, 2, D, generator=generator).bfloat16().requires_grad_()
    start = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    factors = torch.randn(64, generator=generator).bfloat16()
    hidden, reader = SharedKVReader.enter(start, kv, torch.bfloat16)
    total = hidden.float().sum()
    for factor in factors:
        key, value = reader.read()
        total = total + (key * factor).float().sum() + (value * factor).float().sum()
    (ours,) = torch.autograd.grad(total, kv)
    exact = factors.double().sum().expand(kv.shape)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < 2**-8


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_what_is_sent_is_what_is_expected(ranks: int, chunks: int) -> None:
    """Rank by rank: activations that rank r sends are those that r+1 expects, in the order of r's schedule."""
    microbatches = 2 * ranks
    for rank in range(ranks):
        forward, backward = arriving_stages(rank, ranks, chunks, microbatches, None)
        first, last = rank == 0, rank == ranks - 1
        assert len(forward) == microbatches * (chunks - first)
        assert len(backward) == microbatches * (chunks - last)
        assert all(g % ranks == rank for g, _ in forward)
        assert all(g % ranks == (rank + 1) % ranks for g, _ in backward)
        for arrivals in (forward, backward):
            for stage in {g for g, _ in arrivals}:
                assert sorted(n for g, n in arrivals if g == stage) == list(range(microbatches))
