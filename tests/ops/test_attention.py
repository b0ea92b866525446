"""Causal attention in torch equals the float64 definition: outputs and gradients, full and windowed, grouped or not.

Tolerances, relative to each tensor's norm: float64 1e-12, float32 2e-6 (a few roundings of a softmax over twenty keys),
bfloat16 5e-3 for outputs and 2e-2 for gradients (half an ulp is 2^-9 = 2e-3; a gradient goes through two rounded
intermediates and a softmax backward that subtracts).
"""

import pytest
import torch
from support.models import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from yoco_megatron.ops.attention import causal_attention, packed_causal_attention, partial
from yoco_megatron.ops.attention.reference import causal_attention as reference

TOKENS = 13
OUTPUT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3}
GRADIENT = OUTPUT | {torch.bfloat16: 2e-2}


def inputs(
    generator: torch.Generator, heads: int, groups: int, dtype: torch.dtype, tokens: int = TOKENS
) -> list[Tensor]:
    """q, k, v as the model has them: views of [tokens, batch, heads, width]."""
    shapes = [(tokens, 2, heads, 8), (tokens, 2, groups, 8), (tokens, 2, groups, 8)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).permute(1, 2, 0, 3) for shape in shapes
    ]


def run(attention, qkv: list[Tensor], direction: Tensor, window: int | None) -> list[Tensor]:
    """Output and the gradients of q, k and v along `direction`."""
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    out = attention(*leaves, window=window)
    return [out.detach(), *torch.autograd.grad((out * direction.to(out.dtype)).sum(), leaves)]


def compare(qkv: list[Tensor], window: int | None, generator: torch.Generator) -> None:
    dtype = qkv[0].dtype
    direction = torch.randn(qkv[0].shape, generator=generator, dtype=torch.float64)
    got, wanted = run(causal_attention, qkv, direction, window), run(reference, qkv, direction, window)
    assert got[0].dtype == dtype and got[0].shape == qkv[0].shape
    for name, value, expected in zip(("output", "dq", "dk", "dv"), got, wanted):
        tolerance = (OUTPUT if name == "output" else GRADIENT)[dtype]
        # A lone key has probability 1 whatever q and k are: their gradient is zero, and what is left is rounding.
        scale = expected if expected.any() else direction
        error = ((value.double() - expected).norm() / scale.norm()).item()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("window", [None, *range(1, TOKENS + 4)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (4, 1)])
def test_equals_the_definition(heads, groups, window, generator):
    compare(inputs(generator, heads, groups, torch.float64), window, generator)


@pytest.mark.parametrize("window", [None, 1, 3, 6, TOKENS - 1, TOKENS, TOKENS + 2])
@pytest.mark.parametrize("queries", [1, 5, TOKENS - 1])
def test_fewer_queries_are_the_last_ones(queries, window, generator):
    q, k, v = inputs(generator, 6, 2, torch.float64)
    compare([q[:, :, -queries:], k, v], window, generator)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_packed_documents_equal_documents_alone(window, generator):
    """To the last bit: what a document computes does not depend on the pack it is in."""
    queries, keys = [3, 1, 7], [5, 1, 10]
    q, k, v = (
        torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64)
        for lengths, heads in ((queries, 6), (keys, 2), (keys, 2))
    )
    sums = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (queries, keys)]
    packed = packed_causal_attention(q, k, v, *sums, 7, 10, window)
    documents = zip(packed.split(queries), q.split(queries), k.split(keys), v.split(keys))
    for got, *qkv in documents:
        wanted = causal_attention(*(t.transpose(0, 1)[None] for t in qkv), window=window)
        assert torch.equal(got, wanted[0].transpose(0, 1))


@pytest.mark.parametrize("window", [None, 1, 4, 5, TOKENS - 1, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, window, generator):
    compare(inputs(generator, 6, 2, dtype), window, generator)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9])
def test_any_length_against_a_window_of_four(tokens, generator):
    compare(inputs(generator, 4, 2, torch.float64, tokens), 4, generator)


@pytest.mark.parametrize("window", [1, 2, 5, TOKENS, TOKENS + 2])
def test_a_window_lets_exactly_its_keys_through(window, generator):
    """With values that are one-hot by position the output is the probabilities themselves."""
    q, k, _ = inputs(generator, 2, 2, torch.float64)
    v = torch.eye(TOKENS, dtype=torch.float64).expand(2, 2, -1, -1)
    probabilities = causal_attention(q, k, v, window=window)
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
    assert torch.equal(probabilities > 0, ((j <= i) & (j > i - window)).expand_as(probabilities))
    assert torch.equal((probabilities > 0).sum(-1)[0, 0], torch.arange(1, TOKENS + 1).clamp(max=window))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_a_window_costs_memory_linear_in_the_sequence(generator):
    """Twice the tokens, twice the largest tensor: nothing of size tokens x tokens is made."""

    def largest(tokens: int) -> int:
        q, k, v = (t.requires_grad_() for t in inputs(generator, 2, 2, torch.float32, tokens))
        with LargestTensor() as largest_tensor:
            causal_attention(q, k, v, window=8).sum().backward()
        return largest_tensor.elements

    assert largest(2048) == 2 * largest(1024) < 2048**2 / 4


def test_the_comparison_can_fail(generator):
    qkv = inputs(generator, 4, 2, torch.float64)
    direction = torch.ones_like(qkv[0])
    assert relative_error(causal_attention(*qkv, window=5), run(reference, qkv, direction, 6)[0]) > 1e-3


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 3)])
def test_parts_of_one_softmax(heads: int, groups: int) -> None:
    """A causal square and a rectangle before it, merged: output and gradients of causal attention over both."""
    torch.manual_seed(heads)
    queries, before, scale = 7, 5, 8**-0.5
    q = torch.randn(2, heads, queries, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, groups, before + queries, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    wanted = reference(q, k, v)
    do = torch.randn_like(wanted)
    dq, dk, dv = torch.autograd.grad(wanted, (q, k, v), do)
    with torch.no_grad():
        own, earlier = ([x[:, :, at] for x in (k, v)] for at in (slice(before, None), slice(before)))
        o, lse, rng_state = partial.forward(q, *own, True, scale)
        other_out, other_lse, other_rng_state = partial.forward(q, *earlier, False, scale)
        partial.merge_(o, lse, other_out, other_lse)
        gradients = partial.backward(do, q, *own, o, lse, rng_state, True, scale)
        of_earlier = partial.backward(do, q, *earlier, o, lse, other_rng_state, False, scale)
    torch.testing.assert_close(o, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0] + of_earlier[0], dq, rtol=1e-12, atol=1e-12)
    for at, expected in ((1, dk), (2, dv)):
        found = torch.cat((of_earlier[at], gradients[at]), 2)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
