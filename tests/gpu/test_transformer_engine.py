"""Layers of Transformer Engine compute what the plain-torch layers compute, on one GPU.

Reference: the same weights in float32 with plain torch. Tolerances, relative to each tensor's norm: bf16 has 8 bits, so
a single rounding is 2^-9 = 2e-3; a gradient that passed through four layers has collected a few percent at most.
"""

import pytest
import torch
from support.models import (
    BF16,
    FULL_RECOMPUTE,
    SELF_DECODERS,
    STORED_ATTENTION,
    TE,
    WIDE_HEADS,
    plain_name,
    relative_error,
    train_step,
)

pytestmark = pytest.mark.gpu

LOSS_BF16, GRAD_BF16 = 5e-3, 6e-2
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm", "mlp"])
ELEMENTWISE = dict(recompute_elementwise=True, bias_activation_fusion=True)


@pytest.fixture(autouse=True)
def _in_one_process(one_process):
    """All tests here run in a world of one."""


@pytest.mark.parametrize("kind", SELF_DECODERS)
@pytest.mark.parametrize(
    "recompute",
    [{}, FULL_RECOMPUTE, STORED_ATTENTION, SELECTIVE, ELEMENTWISE],
    ids=["plain", "full", "all but attention", "selective", "elementwise"],
)
def test_bf16_equals_float32_torch(kind: str, recompute: dict) -> None:
    reference = train_step(dict(self_decoder=kind))
    result = {plain_name(k): v for k, v in train_step(dict(self_decoder=kind, **TE, **BF16, **recompute)).items()}
    assert relative_error(result["loss"], reference["loss"]) < LOSS_BF16
    grads = [name for name in reference if name.startswith("grad/")]
    assert grads == [name for name in grads if name in result]
    for name in grads:
        error = relative_error(result[name], reference[name])
        assert error < GRAD_BF16, f"{name}: {error:.1e}"


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_bf16_torch_on_gpu_equals_float32(kind: str) -> None:
    """Without Transformer Engine a GPU still trains."""
    reference = train_step(dict(self_decoder=kind))
    result = train_step(dict(self_decoder=kind, **BF16))
    assert relative_error(result["loss"], reference["loss"]) < LOSS_BF16
    for name in reference:
        if name.startswith("grad/"):
            assert relative_error(result[name], reference[name]) < GRAD_BF16, name


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_norms_of_queries_and_keys_biases_and_z_loss(kind: str) -> None:
    model = dict(self_decoder=kind, shared_kv_sets=2, qk_layernorm=True, add_qkv_bias=True)
    model |= dict(loss_chunk_size=17, z_loss_coeff=1e-2)
    reference = train_step(model)
    result = {plain_name(name): value for name, value in train_step(model | TE | BF16).items()}
    assert relative_error(result["loss"], reference["loss"]) < LOSS_BF16
    for name in reference:
        if name.startswith("grad/"):
            error = relative_error(result[name], reference[name])
            assert error < GRAD_BF16, f"{name}: {error:.1e}"


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE, SELECTIVE], ids=["plain", "full", "selective"])
@pytest.mark.parametrize("kind", ["RS", "MS", "gated_delta_net"])
def test_gated_memory_units(kind: str, recompute: dict) -> None:
    """Of the memory that each mixer leaves, on its kernels."""
    model = dict(self_decoder=kind, cross_decoder_pattern="GA")
    reference = train_step(model)
    result = {plain_name(name): value for name, value in train_step(model | TE | BF16 | recompute).items()}
    assert relative_error(result["loss"], reference["loss"]) < LOSS_BF16
    for name in reference:
        if name.startswith("grad/"):
            error = relative_error(result[name], reference[name])
            assert error < GRAD_BF16, f"{name}: {error:.1e}"


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_fp8_recompute_that_keeps_attention(recipe: str) -> None:
    """Against recompute of whole layers in FP8. Both round alike; cuDNN's backward adds in any order."""
    model = WIDE_HEADS | BF16 | TE | dict(self_decoder="gated_retention", ffn_hidden_size=384)
    model |= dict(fp8="hybrid", fp8_recipe=recipe)
    whole, stored = (train_step(model | recompute) for recompute in (FULL_RECOMPUTE, STORED_ATTENTION))
    assert torch.equal(whole["loss"], stored["loss"])
    for name in whole:
        if name.startswith("grad/"):
            assert relative_error(stored[name], whole[name]) < GRAD_BF16, name
