"""Mamba-2 equals transformers' mixer, and its equations, token by token in float64, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from support.models import SEQ, build, document_batch, relative_error, tiny_config
from torch import Tensor, nn
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

from yoco_megatron.convert.tensor_names import Fused
from yoco_megatron.mixers import MAMBA2 as RECORD
from yoco_megatron.model.self_decoder.mamba2 import Mamba2
from yoco_megatron.ops.gated_retention.reference import recurrent
from yoco_megatron.ops.short_convolution.reference import recurrent as convolve
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

BATCH = 4
FLOAT64 = dict(params_dtype=torch.float64, pipeline_dtype=torch.float64)


def mixer(**overrides) -> tuple[Mamba2, dict[str, Tensor]]:
    """A mixer whose weights are all random, and its parameters as an export has them."""
    made = build(tiny_config(self_decoder="mamba2", **overrides)).decoder.layers[0].self_attention
    with torch.no_grad():
        for name in ("D", "norm.weight"):  # which start as ones
            made.get_parameter(name).uniform_(0.5, 1.5)
    return made, exported(made, {name: p.detach() for name, p in made.named_parameters()})


def exported(made: Mamba2, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the module's parameters under exported names."""
    found = dict(tensors)
    fused = RECORD.fused(made.config)
    matrices = {matrix.name: Fused(matrix.name, matrix.names, matrix.groups, matrix.parts) for matrix in fused}
    for name in tensors:
        module, _, end = name.rpartition(".")
        if module in matrices:
            found |= {f"{part}.{end}": value for part, value in matrices[module].split(found.pop(name)).items()}
    return {name.replace("linear_proj", "o_proj"): value for name, value in found.items()}


def hidden(dtype: torch.dtype) -> Tensor:
    return torch.randn(SEQ, BATCH, 64, dtype=torch.float64).to(dtype)


def run(made: Mamba2, u: Tensor, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Output and all gradients, under exported names."""
    u = u.clone().requires_grad_()
    out, _ = made(u, packed_seq_params=SequenceShard(SEQ, BATCH, ids))
    out.backward(hidden_cotangent(out))
    gradients = exported(made, {name: p.grad for name, p in made.named_parameters()})
    return {"out": out.detach(), "u": u.grad, **gradients}


def hidden_cotangent(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)


def test_equals_transformers(one_process) -> None:
    """In fp32, to which transformers' recurrence casts."""
    made, weights = mixer()
    sizes = made.config
    config = Mamba2Config(
        hidden_size=64,
        num_heads=sizes.mamba_num_heads,
        head_dim=sizes.mamba_head_dim,
        expand=1,
        state_size=sizes.mamba_state_dim,
        n_groups=sizes.mamba_num_groups,
        layer_norm_epsilon=sizes.layernorm_epsilon,
        chunk_size=16,
        use_bias=False,
        num_hidden_layers=1,
    )
    theirs = Mamba2Mixer(config, 0)
    joined = {
        "in_proj.weight": [f"{name}_proj.weight" for name in ("z", "x", "B", "C", "dt")],
        "conv1d.weight": [f"{name}_conv.weight" for name in "xBC"],
        "conv1d.bias": [f"{name}_conv.bias" for name in "xBC"],
        "out_proj.weight": ["o_proj.weight"],
    } | {name: [name] for name in ("A_log", "dt_bias", "D", "norm.weight")}
    theirs.load_state_dict({name: torch.cat([weights[part] for part in parts]) for name, parts in joined.items()})
    u = hidden(torch.float32)
    ours = run(made, u)
    u = u.transpose(0, 1).clone().requires_grad_()
    out = theirs(u)
    out.backward(hidden_cotangent(out.transpose(0, 1)).transpose(0, 1))
    assert relative_error(ours["out"], out.transpose(0, 1)) < 1e-5
    assert relative_error(ours["u"], u.grad.transpose(0, 1)) < 1e-5
    for name, parts in joined.items():
        gradient = torch.cat([ours[part] for part in parts])
        assert relative_error(gradient, theirs.get_parameter(name).grad) < 2e-5, name


def test_initial_decays_and_steps(one_process) -> None:
    """-A uniform from 1 to 16 and dt log-uniform from 0.001 to 0.1, as in the authors' code; D is 1."""
    made = build(tiny_config(self_decoder="mamba2", mamba_num_heads=800, mamba_num_groups=4))
    own = made.decoder.layers[0].self_attention
    decays, steps = own.A_log.exp(), F.softplus(own.dt_bias)
    for values, low, high in ((decays, 1.0, 16.0), (steps.log10(), -3.0, -1.0)):
        assert values.min() >= low - 1e-4 and values.max() <= high + 1e-4
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / (12 * 800) ** 0.5  # standard deviations
    assert torch.equal(own.D, torch.ones_like(own.D)) and own.conv.weight.abs().max() <= 0.5


class Equations(nn.Module):
    """The docstring of model/self_decoder/mamba2.py, token by token."""

    def __init__(self, weights: dict[str, Tensor], groups: int, eps: float) -> None:
        super().__init__()
        self.w = {name: value.double().requires_grad_() for name, value in weights.items()}
        self.groups, self.eps = groups, eps

    def forward(self, u: Tensor, ids: Tensor | None) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        w, heads = self.w, len(self.w["A_log"])
        x, B, C = (
            convolve(u @ w[f"{n}_proj.weight"].t(), w[f"{n}_conv.weight"][:, 0], w[f"{n}_conv.bias"], document_ids=ids)[
                0
            ]
            for n in "xBC"
        )
        dt = F.softplus(u @ w["dt_proj.weight"].t() + w["dt_bias"])
        x = x.unflatten(-1, (heads, -1))
        k, q = (
            torch.stack([t.chunk(self.groups, -1)[head * self.groups // heads] for head in range(heads)], dim=2)
            for t in (B, C)
        )
        o, _ = recurrent(q, k, x * dt[..., None], -w["A_log"].exp() * dt, scale=1.0, document_ids=ids)
        y = (o + w["D"][:, None] * x).flatten(2) * F.silu(u @ w["z_proj.weight"].t())
        y = torch.cat([F.rms_norm(part, part.shape[-1:], eps=self.eps) for part in y.chunk(self.groups, -1)], -1)
        return y * w["norm.weight"] @ w["o_proj.weight"].t()


# Relative to each tensor's norm. bf16: 2^-8 a rounding, of which about ten follow one another; steps and decays pass
# through exponentials.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_equals_its_equations(dtype, tolerance, documents, one_process) -> None:
    made = mixer(**FLOAT64)[0].to(dtype)
    ids = document_batch(BATCH) if documents else None
    u = hidden(dtype)
    ours = run(made, u, ids)
    equations = Equations(exported(made, {n: p.detach() for n, p in made.named_parameters()}), 4, 1e-5)
    u = u.double().transpose(0, 1).clone().requires_grad_()
    out = equations(u, ids)
    out.backward(hidden_cotangent(out.transpose(0, 1)).transpose(0, 1))
    want = {"out": out.transpose(0, 1), "u": u.grad.transpose(0, 1), **{n: w.grad for n, w in equations.w.items()}}
    assert ours.keys() == want.keys()
    for name, value in ours.items():
        assert relative_error(value, want[name]) < tolerance, name
