"""The short convolution equals its definition in float64, in outputs, final state and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_megatron.ops.short_convolution import short_convolution
from yoco_megatron.ops.short_convolution.reference import recurrent

B, C, W = 2, 6, 4


def make_inputs(T: int, dtype=torch.float64, state: bool = True, bias: bool = True) -> dict[str, Tensor | None]:
    shapes = {"x": (B, T, C), "weight": (C, W), "bias": (C,), "initial_state": (B, W - 1, C)}
    inputs: dict[str, Tensor | None] = {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}
    return inputs | ({} if state else {"initial_state": None}) | ({} if bias else {"bias": None})


def documents(T: int) -> Tensor:
    """Of one token, of fewer than the kernel sees, and of more; other ones in each row."""
    return torch.stack([(torch.rand(T) < share).cumsum(0) for share in (0.2, 0.6)])


def run(form, inputs: dict[str, Tensor | None], ids: Tensor | None) -> list[Tensor]:
    """Output, final state, and the gradient of every input, with random cotangents on output and final state."""
    leaves = {name: None if x is None else x.clone().requires_grad_() for name, x in inputs.items()}
    state = leaves.pop("initial_state")
    y, final = form(*leaves.values(), initial_state=state, document_ids=ids)
    rng = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=rng, dtype=torch.float64) for out in (y, final)]
    sum((out.double() * c).sum() for out, c in zip((y, final), cotangents)).backward()
    return [y.detach(), final.detach(), *(x.grad for x in (*leaves.values(), state) if x is not None)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 33])
@pytest.mark.parametrize("optional", [True, False])
def test_equals_its_definition(T, packed, optional):
    inputs, ids = make_inputs(T, state=optional, bias=optional), documents(T) if packed else None
    for got, want in zip(run(short_convolution, inputs, ids), run(recurrent, inputs, ids), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_equals_torchs_convolution():
    """The definition is not ours alone."""
    inputs = make_inputs(9, state=False)
    padded = F.pad(inputs["x"].transpose(1, 2), (W - 1, 0))
    want = F.silu(F.conv1d(padded, inputs["weight"][:, None], inputs["bias"], groups=C)).transpose(1, 2)
    torch.testing.assert_close(short_convolution(*list(inputs.values())[:3])[0], want, rtol=1e-12, atol=1e-12)


def test_continues_from_its_state_token_by_token():
    inputs, ids = make_inputs(12), documents(12)
    x, weight, bias, state = inputs.values()
    want, final = short_convolution(x, weight, bias, initial_state=state, document_ids=ids)
    outputs = []
    for t in range(12):
        if t and (new := ids[:, t] != ids[:, t - 1]).any():
            state = state.masked_fill(new[:, None, None], 0.0)
        y, state = short_convolution(x[:, t : t + 1], weight, bias, initial_state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), want)
    torch.testing.assert_close(state, final)


def test_bfloat16_rounds_once():
    """Half a unit in the last place, 2^-9, of the output; gradients are sums of cotangents that are rounded, too."""
    inputs, ids = make_inputs(50, torch.bfloat16), documents(50)
    want = run(recurrent, {name: x.double() for name, x in inputs.items()}, ids)
    got = run(short_convolution, inputs, ids)
    for index, (ours, exact) in enumerate(zip(got, want)):
        limit = 2**-8 if index < 2 else 2**-7
        assert (ours.double() - exact.double()).norm() < limit * exact.double().norm(), index


def test_layouts_are_checked():
    x, weight, bias, state = make_inputs(5).values()
    for args, options in [
        ((x[0], weight), {}),
        ((x, weight.t()), {}),
        ((x, weight, bias[:3]), {}),
        ((x, weight, bias), {"initial_state": state[:, 1:]}),
        ((x, weight, bias), {"document_ids": documents(4)}),
    ]:
        with pytest.raises(ValueError, match="a short convolution needs"):
            short_convolution(*args, **options)
