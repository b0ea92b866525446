"""Elementwise recompute in backward: the same gradients to the bit, and less memory saved."""

import os
import subprocess
import sys

import pytest
import torch
from support.models import SELF_DECODERS, VOCAB, build, relative_error, tiny_config, train_step

from yoco_megatron.mixers import get_mixer
from yoco_megatron.model.layers.recompute import recompute_in_backward

pytestmark = pytest.mark.usefixtures("one_process")
TOKENS, SAMPLES = 23, 2


@pytest.mark.parametrize("kind", SELF_DECODERS)
@pytest.mark.parametrize(
    "more",
    [{}, dict(bf16=True, params_dtype=torch.bfloat16), dict(bias_activation_fusion=True)],
    ids=["fp32", "bf16", "fused SwiGLU"],
)
def test_gradients_are_the_same_bits(kind: str, more: dict) -> None:
    plain = train_step(dict(self_decoder=kind, **more))
    recomputed = train_step(dict(self_decoder=kind, recompute_elementwise=True, **more))
    assert plain.keys() == recomputed.keys()
    for name, want in plain.items():
        assert torch.equal(recomputed[name], want), name


COMPILED = """
import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from yoco_megatron.model.layers import mlp

wide = torch.randn(50, 2, 192, dtype=torch.bfloat16)
recomputed = {}
for name in ("swiglu_into", "fused_swiglu_into"):
    recomputed[name] = torch.empty(50, 2, 96, dtype=torch.bfloat16)
    getattr(mlp, name)(wide, recomputed[name])
assert torch.equal(recomputed["swiglu_into"], mlp.swiglu(wide))
assert torch.equal(recomputed["fused_swiglu_into"], bias_swiglu_impl(wide, None))
assert not torch.equal(*recomputed.values()), "nothing was compiled"
"""


@pytest.mark.slow
def test_bits_of_the_compiled_swiglu() -> None:
    """On a GPU the fused one is compiled; here inductor compiles it for the CPU, where the stand-in has not switched
    compilation off. It rounds once and the plain one twice, so each must be recomputed by its own function."""
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    run = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def saved_values(kind: str, **overrides: object) -> int:
    """Values per token that autograd saves in a forward pass, without weights."""
    model = build(tiny_config(self_decoder=kind, bias_activation_fusion=True, **overrides)).train()
    ids = torch.randint(0, VOCAB, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(1))
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
        logits = model(ids)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved.values()}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    total = sum(size for storage, size in storages.items() if storage not in weights)
    logits.sum().backward()  # the graph lives until here
    return total // 4 // (SAMPLES * TOKENS)


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_recomputed_values_are_not_saved(kind: str) -> None:
    config = tiny_config()
    difference = saved_values(kind) - saved_values(kind, recompute_elementwise=True)
    mixers = get_mixer(kind).recomputed_values(config) * config.num_self_decoder_layers
    assert difference == config.num_layers * config.ffn_hidden_size + mixers


def test_with_full_recompute_and_with_mlp_chunks() -> None:
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    plain = train_step({})
    for more in (full, dict(mlp_chunks_for_training=3)):
        recomputed = train_step(dict(recompute_elementwise=True, **more))
        for name, want in plain.items():
            assert relative_error(recomputed[name], want) < 1e-5, name


def test_block_recompute_counts_over_all_sets_of_kv() -> None:
    """The first layers of a half run again in backward, whatever K,V they read."""
    block = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=3)
    model = build(tiny_config(num_self_decoder_layers=0, shared_kv_sets=2, **block)).train()
    calls = [0] * 4
    for index, layer in enumerate(model.decoder.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    model(torch.zeros(1, TOKENS, dtype=torch.long)).sum().backward()
    assert calls == [2, 2, 2, 1]


def test_memory_is_refilled_before_the_reader_needs_it() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(3, 4, requires_grad=True)
    y = x.detach() * 2
    output = y @ weight
    recompute_in_backward(y, output, lambda out: out.copy_(x.detach() * 2))
    assert y.untyped_storage().nbytes() == 0
    output.sum().backward()
    torch.testing.assert_close(weight.grad, (2 * x.detach()).t() @ torch.ones(5, 4))
    with pytest.raises(AssertionError, match="view"):
        recompute_in_backward(y[1:], output, lambda out: None)
