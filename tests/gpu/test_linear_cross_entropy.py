"""The chunked loss on a GPU: bf16 against float64, and the memory that it is for."""

import pytest
import torch
import torch.nn.functional as F

from yoco_megatron.ops.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("into_buffer", [False, True])
def test_bf16_against_float64(into_buffer: bool):
    """1e-2: logits and their gradient are rounded to 2^-9 for the matrix products."""
    x, weight = torch.randn(300, 256, device="cuda").bfloat16(), torch.randn(1000, 256, device="cuda").bfloat16() * 0.1
    labels, dloss = torch.randint(0, 1000, (300,), device="cuda"), torch.rand(300, device="cuda")
    main_grad = torch.zeros(1000, 256, device="cuda") if into_buffer else None
    results = []
    for wide in (False, True):
        a, b = ((t.double() if wide else t.clone()).requires_grad_() for t in (x, weight))
        if wide:
            loss = F.cross_entropy(a @ b.t(), labels, reduction="none")
        else:
            loss, _ = linear_cross_entropy(a, b, labels, 128, main_grad=main_grad)
        loss.backward(dloss.to(loss.dtype))
        results.append((loss.detach(), a.grad, b.grad))
    if into_buffer:
        results[0] = *results[0][:2], main_grad
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() < 1e-2 * want.norm()


@pytest.mark.xdist_group("a whole GPU's memory")
@pytest.mark.parametrize(("into_buffer", "limit"), [(False, 2e9), (True, 1e9)])
def test_memory_at_32k_tokens_and_a_vocabulary_of_100k(into_buffer: bool, limit: float):
    """Beyond inputs and gradients, where whole fp32 logits would take 13 GB: the logits of a chunk, 0.4 GB, and, where
    Megatron's buffer does not take it, the weight's gradient in fp32, 1.2 GB."""
    x = torch.randn(32768, 3072, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(100352, 3072, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    labels = torch.randint(0, 100352, (32768,), device="cuda")
    main_grad = torch.zeros_like(weight, dtype=torch.float32) if into_buffer else None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, weight, labels, 2048, main_grad=main_grad)[0].sum().backward()
    grads = x.grad.nbytes + weight.grad.nbytes
    assert torch.cuda.max_memory_allocated() - before - grads < limit
