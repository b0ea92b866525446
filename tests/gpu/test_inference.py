"""Decoding on a GPU: kernels, blocks, rings and the CUDA graph against transformers' own forward on the same device.

float32 without TF32: 1e-4 relative (the retention kernels split their products, others differ in order). bfloat16 3e-2:
some forty roundings of 2^-9 on both sides.
"""

import importlib.util

import pytest
import torch
from support.models import SELF_DECODERS, relative_error

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference.engine import Engine
from yoco_megatron.ops.attention.quantized import FORMATS, pack, unpack

pytestmark = pytest.mark.gpu
SIZES = dict(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.08,
)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


THREE_SETS, EXPERTS = "three sets of K,V", "experts"


def build(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    sets = 3 if kind == THREE_SETS else 1
    experts = dict(num_experts=8, moe_intermediate_size=128, router_dtype="fp32") if kind == EXPERTS else {}
    kind = "gated_retention" if kind in (THREE_SETS, EXPERTS) else kind
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        own = dict(
            self_decoder=kind,
            self_decoder_heads=2,
            sliding_window=100,
            mamba_num_heads=8,
            mamba_head_dim=64,
            mamba_state_dim=128,
            mamba_num_groups=2,
            shared_kv_sets=sets,
            qk_norm=sets > 1,
            qkv_bias=sets > 1,
            **experts,
        )
        model = YocoForCausalLM(YocoConfig(**SIZES, **own))
    return model.to("cuda", dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", [*SELF_DECODERS, "MSR", THREE_SETS, "llama"])
def test_engine_equals_transformers(kind, dtype):
    model = build(kind, dtype)
    tokens = torch.randint(0, 512, (3, 700), generator=torch.Generator().manual_seed(1)).cuda()
    expected = model(tokens, use_cache=False).logits[:, 599:]
    for chunk in (1000, 256, 100):
        engine = Engine(model, 1000, capacity=128, reserve=kind == "llama", prefill_chunk=chunk)
        found = [engine.prefill(tokens[:, :600])]
        found += [engine.step(tokens[:, 600 + i]).clone() for i in range(100)]
        assert engine.graph is not None
        error = relative_error(torch.stack(found, dim=1), expected)
        print(f"{kind} {dtype} chunks of {chunk}: {error:.1e}")
        assert error < TOLERANCE[dtype]
        model.set_attn_implementation("sdpa")


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("self_decoder", [*SELF_DECODERS, THREE_SETS])
def test_one_byte_a_value(self_decoder, kind):
    """The logits of the model whose shared K,V are rounded where they are made, which is far from no rounding."""
    model = build(self_decoder, torch.float32)
    tokens = torch.randint(0, 512, (3, 700), generator=torch.Generator().manual_seed(1)).cuda()
    exact = model(tokens, use_cache=False).logits[:, 599:]
    hook = model.model.shared_kv.register_forward_hook(
        lambda _, inputs, pairs: [tuple(unpack(pack(t, kind), kind, t.dtype) for t in pair) for pair in pairs]
    )
    expected = model(tokens, use_cache=False).logits[:, 599:]
    hook.remove()
    moved = relative_error(expected, exact)
    for chunk in (1000, 256):
        engine = Engine(model, 1000, capacity=128, prefill_chunk=chunk, kv_cache_dtype=kind)
        found = [engine.prefill(tokens[:, :600])]
        found += [engine.step(tokens[:, 600 + i]).clone() for i in range(100)]
        error = relative_error(torch.stack(found, dim=1), expected)
        print(f"{self_decoder} {kind} chunks of {chunk}: {error:.1e}, by one byte a value {moved:.1e}")
        assert engine.graph is not None and error < moved / 5
        model.set_attn_implementation("sdpa")


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_experts(dtype):
    """Without a graph; the median over positions, as rounding may choose the other of two close experts."""
    model = build(EXPERTS, dtype)
    tokens = torch.randint(0, 512, (3, 120), generator=torch.Generator().manual_seed(1)).cuda()
    expected = model(tokens, use_cache=False).logits[:, 99:]
    engine = Engine(model, 1000, capacity=128, prefill_chunk=64)
    found = [engine.prefill(tokens[:, :100]), *(engine.step(tokens[:, i]) for i in range(100, 120))]
    assert engine.graph is None
    off = (torch.stack(found, dim=1) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert off.median() < TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_attention_implementations(kind, implementation, padded):
    """transformers' attentions against its eager one in the same dtype, whole and with an early exit."""
    flash = implementation == "flash_attention_2"
    if flash and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    dtype = torch.bfloat16 if flash else torch.float32
    model = build(kind, dtype)
    device = next(model.parameters()).device
    tokens = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, slice(None, 130) if padded == "left" else slice(-130, None)] = 0
    model.set_attn_implementation("eager")
    expected = model(tokens, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(implementation)
    for kept in (0, 140):
        found = model(tokens, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        seen = mask[:, -kept:].bool()
        error = relative_error(found[seen], expected[:, -kept:][seen])
        print(f"{kind} {implementation} padded {padded} kept {kept}: {error:.1e}")
        assert error < TOLERANCE[dtype]
