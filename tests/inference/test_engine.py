"""The engine's blocks, rings and states give what transformers' caches give, for YOCO and for a Llama.

fp32 on the CPU, logits 1e-5 relative (other shapes, other sums); tests/gpu/test_inference.py runs kernels and graphs.
"""

import pytest
import torch
from hf.test_generation import CLOSE, NEW, greedy, model, prompts  # noqa: F401  (model is a fixture)
from support.models import relative_error
from transformers import LlamaConfig, LlamaForCausalLM

from yoco_megatron.inference.cache import BlockCache
from yoco_megatron.inference.engine import Engine


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 8, 64, 130])
@pytest.mark.parametrize("chunk", [1000, 7])
def test_equals_transformers(model, length, chunk):  # noqa: F811
    tokens = prompts(2, length + NEW, seed=length)
    expected = model(tokens, use_cache=False).logits[:, length - 1 :]
    engine = Engine(model, 1000, capacity=64, prefill_chunk=chunk)
    found = [engine.prefill(tokens[:, :length])]
    blocks = engine.cache.layers[3].blocks
    first = blocks[0][0].data_ptr()
    found += [engine.step(tokens[:, length + i]).clone() for i in range(NEW)]
    assert relative_error(torch.stack(found, dim=1), expected) < CLOSE
    assert len(blocks) == -(-(length + NEW) // 64) and blocks[0][0].data_ptr() == first, "grown without moving"


@torch.no_grad()
def test_transformer():
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    ).eval()
    tokens = prompts(2, 60)
    expected = llama(tokens, use_cache=False).logits[:, 39:]
    engine = Engine(llama, 100, capacity=64, reserve=True, prefill_chunk=13)
    found = [engine.prefill(tokens[:, :40])] + [engine.step(tokens[:, 40 + i]).clone() for i in range(20)]
    assert relative_error(torch.stack(found, dim=1), expected) < CLOSE
    assert engine.cache.nbytes() == 3 * 2 * 2 * 2 * 128 * 16 * 4  # layers, K and V, batch, groups, tokens, width, fp32


@torch.no_grad()
def test_bytes(model):  # noqa: F811
    engine = Engine(model, 1000, capacity=64)
    engine.prefill(prompts(2, 130))
    config = model.config
    of_mixer = {
        "gated_retention": config.hidden_size * config.self_decoder_head_dim,
        "sliding_window": 2 * 64 * config.hidden_size,  # a ring of 8 slots takes a tile of 64
        "gated_delta_net": config.hidden_size * (config.self_decoder_head_dim + 3 * 3),
        "mamba2": 4 * 16 * 8 + 3 * (4 * 16 + 2 * 2 * 8),  # states of heads; three inputs of the convolution
    }
    fixed = sum(of_mixer[mixer] for mixer in config.self_decoder_mixers)
    shared = config.shared_kv_sets * 2 * 192 * config.num_key_value_heads * config.head_dim
    assert engine.cache.nbytes() == 4 * 2 * (fixed + shared)


def test_bad_input(model):  # noqa: F811
    with pytest.raises(ValueError, match="multiple of 64"):
        BlockCache(model.config, 100, capacity=100)
    with pytest.raises(ValueError, match="at least one token"):
        Engine(model, 100).prefill(torch.zeros(1, 0, dtype=torch.long))
    engine = Engine(model, 64, capacity=64, reserve=True)
    with pytest.raises(ValueError, match="reserved for 64 tokens, 65 are needed"):
        engine.prefill(prompts(1, 65))
    engine = Engine(model, 64, capacity=64)
    engine.prefill(prompts(1, 10))
    with pytest.raises(ValueError, match="one batch of prompts"):
        engine.prefill(prompts(1, 10))
