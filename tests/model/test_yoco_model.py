"""The model equals an independent float64 YOCO (support/reference_model.py): logits, loss, every parameter's gradient.

Both sides run in float64 on the same weights, drawn with random norms so that a norm in the wrong place shows.
Tolerances, relative to each tensor's norm:
- logits, and gradients of a random linear function of them, 1e-11: float64 sums in another order over four layers.
- loss and its gradients 1e-6: Megatron's cross entropy works in fp32 whatever the logits are.
- bfloat16 2e-2: each of some forty roundings is 2^-9 = 2e-3, and they add up as a random walk.
"""

from dataclasses import replace

import pytest
import torch
from support import reference_model
from support.models import SELF_DECODERS, VOCAB, build, relative_error, tiny_config
from support.reference_model import Sizes

from yoco_megatron.model.init import named_parameters
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.model.yoco_model import YOCOModel

EXACT, FP32_LOSS = 1e-11, 1e-6
TOKENS = 37  # a multiple of neither the window (7) nor the retention chunk (16)
pytestmark = pytest.mark.usefixtures("one_process")

SLIDING = {"self_decoder": "sliding_window"}
CASES = {
    "retention": {},
    "sliding window": SLIDING,
    "cross attention without groups": {"num_query_groups": 8},
    "one K,V head": {"num_query_groups": 1},
    "self-decoder groups": dict(**SLIDING, self_decoder_query_groups=2),
    "one self-decoder K,V head": dict(**SLIDING, self_decoder_query_groups=1),
    "split 3:1, retention": {"num_self_decoder_layers": 3},
    "split 3:1, sliding window": dict(num_self_decoder_layers=3, **SLIDING),
    "split 1:3, retention": {"num_self_decoder_layers": 1},
    "split 1:3, sliding window": dict(num_self_decoder_layers=1, **SLIDING),
    "split 0:1": {"num_self_decoder_layers": 0},
    "odd depth": {"num_layers": 3, "num_self_decoder_layers": 1},
    "standard rope, halves": {"rope_variant": "standard", "rotary_interleaved": False},
    "standard rope, pairs": dict(rope_variant="standard", rotary_interleaved=True, **SLIDING),
    "embedding not scaled": {"scale_embedding": False},
    "window longer than the sequence": dict(**SLIDING, self_decoder_window=TOKENS + 5),
    "window as long as the sequence": dict(**SLIDING, self_decoder_window=TOKENS),
    "window 2": dict(**SLIDING, self_decoder_window=2),
    "heads of other widths than hidden / heads": {"kv_channels": 16, "self_decoder_head_dim": 12},
    "heads of other widths, sliding window": dict(**SLIDING, self_decoder_query_groups=2, self_decoder_head_dim=12),
    "another temperature": {"decay_temperature": 3.0},
    "one chunk": {"retention_chunk_size": 64},
    "another eps": {"layernorm_epsilon": 1e-2},
    "two sets of K,V": {"num_self_decoder_layers": 0, "shared_kv_sets": 2},
    "a set of K,V for each layer": dict(**SLIDING, shared_kv_sets=2),
    "K,V of two sources": {"shared_kv_sources": [1, 2]},
    "two sets of K,V of an earlier layer, QK-norm and biases": dict(
        **SLIDING, shared_kv_sources=[1], shared_kv_sets=2, qk_layernorm=True, add_qkv_bias=True
    ),
    "QK-norm, retention": {"qk_layernorm": True},
    "QK-norm, biases, sliding window": dict(**SLIDING, qk_layernorm=True, add_qkv_bias=True),
    "QK-norm, biases, two sets of K,V": dict(
        **SLIDING, self_decoder_query_groups=2, shared_kv_sets=2, qk_layernorm=True, add_qkv_bias=True
    ),
    "retention, then windows": dict(self_decoder="RS", self_decoder_query_groups=2),
    "gated DeltaNet": {"self_decoder": "gated_delta_net"},
    "gated DeltaNet of other widths, then windows": dict(
        self_decoder="GS", self_decoder_head_dim=12, self_decoder_query_groups=2, layernorm_epsilon=1e-2
    ),
    "windows around retention, QK-norm and biases": dict(
        self_decoder="SRS", num_self_decoder_layers=3, self_decoder_query_groups=2, qk_layernorm=True, add_qkv_bias=True
    ),
    "a gated memory unit between attention": dict(num_layers=5, num_self_decoder_layers=2, cross_decoder_pattern="AGA"),
    "gated memory units of an earlier layer, two sets of K,V, at the ends": dict(
        num_layers=8,
        num_self_decoder_layers=2,
        self_decoder="GS",
        cross_decoder_pattern="GAGAAG",
        shared_kv_sources=[1, 2],
        self_decoder_query_groups=2,
        self_decoder_head_dim=12,
    ),
    "biases, retention, two sets of K,V": dict(shared_kv_sets=2, add_qkv_bias=True),
}


def sizes_of(config: YOCOConfig) -> Sizes:
    return Sizes(
        num_layers=config.num_layers,
        num_self_decoder_layers=config.num_self_decoder_layers,
        self_decoder=config.self_decoder,
        self_heads=config.self_decoder_heads,
        self_groups=config.self_decoder_query_groups,
        heads=config.num_attention_heads,
        groups=config.num_query_groups,
        window=config.self_decoder_window,
        tau=config.decay_temperature,
        rope=config.rope_variant,
        interleaved=config.rotary_interleaved,
        scale_embedding=config.scale_embedding,
        eps=config.layernorm_epsilon,
        kv_sets=config.shared_kv_sets,
        kv_sources=tuple(config.shared_kv_sources or ()),
        cross_pattern=config.cross_decoder_pattern or "",
    )


def build_float64(tied: bool, generator: torch.Generator, **overrides) -> YOCOModel:
    """A model with norms that are not 1 and gates that spread decays from quick to slow."""
    model = build(tiny_config(params_dtype=torch.float64, **overrides), tied)
    with torch.no_grad():
        for name, param in named_parameters(model):
            if param.dim() == 1:
                param.copy_(0.5 + torch.rand(param.shape, generator=generator))
            elif name.endswith("linear_decay.weight"):
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model


def random_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (3, TOKENS + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def leaves(model: YOCOModel) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone().requires_grad_() for name, param in named_parameters(model)}


def gradients(model: YOCOModel) -> dict[str, torch.Tensor]:
    """The gradients of the last backward, taken off the parameters."""
    found = {name: param.grad for name, param in named_parameters(model)}
    model.zero_grad(set_to_none=True)
    return found


def compare(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, expected in reference.items():
        assert ours[name] is not None and expected is not None, f"{name} has no gradient"
        error = relative_error(ours[name], expected)
        assert error < tolerance, f"{name}: relative error {error:.1e}"  # nan fails too


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, tied: bool, generator: torch.Generator) -> None:
    model = build_float64(tied, generator, loss_chunk_size=5, **CASES[case])
    sizes, weights = sizes_of(model.config), leaves(model)
    tokens, labels = random_batch(generator)

    logits = model(tokens)
    expected = reference_model.logits(reference_model.weights_from_yoco(weights, sizes), tokens, sizes)
    assert logits.dtype == torch.float64
    assert relative_error(logits, expected) < EXACT
    direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (logits * direction).sum().backward()
    wanted = torch.autograd.grad((expected * direction).sum(), list(weights.values()), retain_graph=True)
    compare(gradients(model), dict(zip(weights, wanted)), EXACT)

    in_chunks = model(tokens, labels=labels)
    model.config.loss_chunk_size = 0
    loss = model(tokens, labels=labels)
    assert loss.shape == labels.shape
    assert relative_error(in_chunks, loss) < FP32_LOSS and in_chunks.is_contiguous()  # Megatron views it as a vector
    expected_loss = reference_model.mean_loss(expected, labels)
    assert relative_error(loss.mean(), expected_loss) < FP32_LOSS
    loss.mean().backward()
    wanted = torch.autograd.grad(expected_loss, list(weights.values()))
    compare(gradients(model), dict(zip(weights, wanted)), FP32_LOSS)


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_bfloat16_and_its_fp32_residual(kind: str, generator: torch.Generator) -> None:
    """--fp32-residual-connection keeps the stream between layers in fp32, which is closer to the truth."""
    errors = []
    tokens = random_batch(generator)[0]
    for fp32_residual in (False, True):
        config = tiny_config(
            self_decoder=kind, bf16=True, params_dtype=torch.bfloat16, fp32_residual_connection=fp32_residual
        )
        model = build(config)
        state = {name: param.detach().double() for name, param in named_parameters(model)}
        sizes = sizes_of(config)
        expected = reference_model.logits(reference_model.weights_from_yoco(state, sizes), tokens, sizes)
        logits = model(tokens)
        assert logits.dtype == torch.bfloat16
        errors.append(relative_error(logits, expected))
    assert errors[1] < errors[0] < 2e-2, errors


DIFFERENT = {
    "tau": {"tau": 15.0},
    "theta": {"theta": 9999.0},
    "rope": {"rope": "standard"},
    "pairs": {"interleaved": False},
    "embedding scale": {"scale_embedding": False},
    "eps": {"eps": 1.1e-5},
    "split": {"num_self_decoder_layers": 1},
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_the_comparison_can_fail(what: str, generator: torch.Generator) -> None:
    """The smallest change of the reference is far outside the tolerance."""
    model = build_float64(False, generator)
    sizes, tokens = sizes_of(model.config), random_batch(generator)[0]
    weights = reference_model.weights_from_yoco(leaves(model), sizes)
    other = reference_model.logits(weights, tokens, replace(sizes, **DIFFERENT[what]))
    assert relative_error(model(tokens), other) > 1e3 * EXACT


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_window_one_off_is_seen(off_by: int, generator: torch.Generator) -> None:
    model = build_float64(False, generator, **SLIDING)
    sizes, tokens = sizes_of(model.config), random_batch(generator)[0]
    weights = reference_model.weights_from_yoco(leaves(model), sizes)
    other = reference_model.logits(weights, tokens, replace(sizes, window=sizes.window + off_by))
    assert relative_error(model(tokens), other) > 1e-3


def test_swapped_halves_of_the_ffn_are_seen(generator: torch.Generator) -> None:
    """silu belongs to the first half of fc1."""
    model = build_float64(False, generator)
    sizes, tokens = sizes_of(model.config), random_batch(generator)[0]
    weights = reference_model.weights_from_yoco(leaves(model), sizes)
    weights["2.a"], weights["2.b"] = weights["2.b"], weights["2.a"]
    assert relative_error(model(tokens), reference_model.logits(weights, tokens, sizes)) > 1e-3


def test_one_token(generator: torch.Generator) -> None:
    model = build_float64(False, generator)
    sizes, tokens = sizes_of(model.config), random_batch(generator)[0][:, :1]
    expected = reference_model.logits(reference_model.weights_from_yoco(leaves(model), sizes), tokens, sizes)
    assert relative_error(model(tokens), expected) < EXACT
