"""Our loop generates what transformers' generates, from any cache, batch and chunk of the prompt."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from hf.test_generation import NEW, PROMPT, greedy, model, prompts  # noqa: F401  (model is a fixture)
from support.models import relative_error

from yoco_megatron.inference.engine import Engine
from yoco_megatron.inference.generation import CachedModel, Sampling, decoder_for, generate
from yoco_megatron.ops.attention.quantized import FORMATS, SCALE_BYTES, pack, unpack

GREEDY = Sampling(temperature=0)


def rows(steps) -> list[list[int]]:
    """Tokens of each prompt."""
    return [[token for token in row if token is not None] for row in zip(*steps)]


@pytest.mark.parametrize("chunk", [1000, 10])
def test_equals_transformers(model, chunk):  # noqa: F811
    expected = greedy(model, prompts())[:, PROMPT:].tolist()
    assert rows(generate(CachedModel(model, chunk), prompts().tolist(), NEW, GREEDY)) == expected
    engine = Engine(model, 100, capacity=64, prefill_chunk=chunk)
    assert rows(generate(engine, prompts().tolist(), NEW, GREEDY)) == expected


def test_ragged_batch(model):  # noqa: F811
    batch = [prompts(1, length, seed=length)[0].tolist() for length in (3, 17, 37)]
    alone = [rows(generate(CachedModel(model), [prompt], NEW, GREEDY))[0] for prompt in batch]
    for chunk in (10, 1):
        assert rows(generate(CachedModel(model, chunk), batch, NEW, GREEDY)) == alone
    assert isinstance(decoder_for(model, batch, NEW), CachedModel)
    with pytest.raises(ValueError, match="prompts of one length"):
        next(generate(Engine(model, 100, capacity=64), batch, NEW, GREEDY))


@pytest.mark.parametrize(
    "decoder", [CachedModel, partial(Engine, max_length=100, capacity=64)], ids=["cached", "engine"]
)
def test_one_position_of_a_prompt_enters_the_cross_decoder(model, decoder):  # noqa: F811
    rows = []
    model.model.cross_layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    decoder(model, prefill_chunk=10).prefill(prompts())
    assert rows == [1] and PROMPT > 10


def test_ends_and_limits(model):  # noqa: F811
    free = rows(generate(CachedModel(model), prompts().tolist(), NEW, GREEDY))
    end = free[0][5]
    ended = rows(generate(CachedModel(model), prompts().tolist(), NEW, GREEDY, end=end))
    for row, whole in zip(ended, free):
        assert row == (whole[: whole.index(end)] if end in whole else whole)
    few = Sampling(temperature=0, vocab_size=11)
    assert max(max(row) for row in rows(generate(CachedModel(model), prompts().tolist(), NEW, few))) < 11
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="no token"):
            next(generate(CachedModel(model), bad, NEW, GREEDY))


def test_cache_bytes(model):  # noqa: F811
    decoder = CachedModel(model)
    list(generate(decoder, prompts(1).tolist(), 4, GREEDY))
    config, tokens = model.config, PROMPT + 3
    of_mixer = {
        "gated_retention": config.hidden_size * config.self_decoder_head_dim,
        "sliding_window": 2 * (config.sliding_window - 1) * config.hidden_size,
        "gated_delta_net": config.hidden_size * (config.self_decoder_head_dim + 3 * 3),
        "mamba2": 4 * 16 * 8 + 3 * (4 * 16 + 2 * 2 * 8),  # states of heads; three inputs of the convolution
    }
    fixed = sum(of_mixer[mixer] for mixer in config.self_decoder_mixers)
    elements = fixed + config.shared_kv_sets * 2 * tokens * config.num_key_value_heads * config.head_dim
    assert decoder.nbytes() == 4 * elements


def test_top_p_and_temperature():
    """Frequencies of 20000 draws; four standard deviations of a share are at most 0.015."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, 9.0]]).expand(20000, -1)
    generator = torch.Generator().manual_seed(0)
    ids = Sampling(temperature=2.0, top_p=0.7, vocab_size=4).draw(logits, generator)
    probabilities = torch.tensor([3.0, 2.0, 1.0, 0.0]).div(2).softmax(-1)
    kept = probabilities[:2] / probabilities[:2].sum()  # 0.455 and 0.276 reach 0.7
    shares = torch.bincount(ids, minlength=4) / len(ids)
    assert torch.allclose(shares[:2], kept, atol=0.015) and shares[2:].sum() == 0
    ids = Sampling(temperature=0.001).draw(1e4 * logits, generator)
    assert (ids == 4).all(), "the smallest temperature does not overflow"


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("temperature", (-1, float("nan"), float("inf"), 1e-300, 1e300)),
        ("top_p", (0, 1.5, -0.1, float("nan"))),
        ("seed", (-1, 2**63)),
    ],
)
def test_numbers_that_sample_nothing_are_refused(flag, values):
    for value in values:
        with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')} {value}".replace("+", r"\+")):
            Sampling(**{flag: value})


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMATS)
def test_one_byte_a_value(model, kind):  # noqa: F811
    """Both caches give the logits of the model whose shared K,V are rounded where they are made; and half the bytes."""
    tokens = prompts(2, PROMPT + NEW)
    exact = model(tokens, use_cache=False).logits[:, PROMPT - 1 :]
    rounded = deepcopy(model)
    for name in model.config.kv_names.values():
        rounded.model.get_submodule(name).register_forward_hook(
            lambda _, inputs, pairs: [tuple(unpack(pack(t, kind), kind, t.dtype) for t in pair) for pair in pairs]
        )
    expected = rounded(tokens, use_cache=False).logits[:, PROMPT - 1 :]
    moved = relative_error(expected, exact)
    assert 1e-3 < moved < {"int8": 0.02, "fp8": 0.08}[kind]
    plain = CachedModel(model)
    plain.prefill(tokens)
    for chunk in (1000, 7):
        engine = Engine(model, 100, capacity=64, prefill_chunk=chunk, kv_cache_dtype=kind)
        for decoder in (CachedModel(model, chunk, kind), engine):
            model.set_attn_implementation("yoco_blocks" if decoder is engine else "sdpa")
            found = [decoder.prefill(tokens[:, :PROMPT])]
            found += [decoder.step(tokens[:, PROMPT + i]).clone() for i in range(NEW)]
            # Other sums move a value by 1e-7, and some few across the middle between two steps of one byte.
            assert relative_error(torch.stack(found, dim=1), expected) < moved / 5
    model.set_attn_implementation("sdpa")
    cached = CachedModel(model, 7, kind)
    cached.prefill(tokens)
    config = model.config
    values = config.shared_kv_sets * 2 * tokens.numel() * config.num_key_value_heads
    assert plain.nbytes() - cached.nbytes() == values * (4 * config.head_dim - (config.head_dim + SCALE_BYTES))
