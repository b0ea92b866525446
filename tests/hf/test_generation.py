"""Cached generation is uncached generation, token for token; an early exit is the full forward's last positions.

Random models with a large embedding, so that greedy choices are clear of rounding. That also keeps them clear of some
mistakes, so logits are compared as well; fp32, 1e-5 relative: sums over other shapes of the same numbers.
"""

import pytest
import torch
from support.exported import small_config
from support.models import SELF_DECODERS, relative_error
from transformers import AttentionInterface, DynamicCache, StaticCache

from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

CLOSE = 1e-5
VOCAB, NEW, PROMPT = 257, 24, 37


MODELS = {kind: dict(self_decoder=kind, num_hidden_layers=6) for kind in SELF_DECODERS}
MODELS["two sets of K,V"] = dict(
    self_decoder="sliding_window", num_hidden_layers=7, num_self_decoder_layers=3, shared_kv_sets=2
)
MODELS["K,V of two sources"] = dict(
    self_decoder="sliding_window",
    num_hidden_layers=7,
    num_self_decoder_layers=3,
    shared_kv_sets=2,
    shared_kv_sources=[1, 3],
)
MODELS["a mixer for each layer"] = dict(self_decoder="RSM", num_hidden_layers=6)
MODELS["gated memory units"] = dict(self_decoder="RMS", num_hidden_layers=6, cross_decoder_pattern="GAG")
MODELS["gated DeltaNet"] = dict(self_decoder="RGG", num_hidden_layers=6)


@pytest.fixture(params=MODELS)
def model(request) -> YocoForCausalLM:
    torch.manual_seed(3)
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, max_position_embeddings=512, pad_token_id=0)
    return YocoForCausalLM(small_config(**MODELS[request.param], **sizes)).eval()


def prompts(batch: int = 2, length: int = PROMPT, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: YocoForCausalLM, tokens: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, **options)


STATIC = {"cache_implementation": "static", "disable_compile": True}
CHUNKS = {"prefill_chunk_size": 7}
CACHES = {"dynamic": {}, "static": STATIC, "in chunks": CHUNKS, "static, in chunks": STATIC | CHUNKS}


def caches(model: YocoForCausalLM) -> list[DynamicCache]:
    """An empty cache of each kind."""
    return [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=160)]


def assert_same(model: YocoForCausalLM, tokens: torch.Tensor, one: dict, other: dict) -> None:
    """Generation with the options `one` and with `other`: tokens and the logits that they were chosen by."""
    found = [greedy(model, tokens, output_logits=True, return_dict_in_generate=True, **each) for each in (one, other)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert relative_error(*(torch.stack(each.logits) for each in found)) < CLOSE


def cache_elements(cache: DynamicCache) -> list[int]:
    """Numbers stored per layer."""
    states = [list(getattr(layer, "recurrent_states", {}).values()) for layer in cache.layers]
    pairs = [[getattr(layer, "keys", None), getattr(layer, "values", None)] for layer in cache.layers]
    return [sum(t.numel() for t in a + b if torch.is_tensor(t)) for a, b in zip(states, pairs)]


@torch.no_grad()
def test_steps_equal_one_forward(model):
    """A prefill and then one token at a time, and chunks of any length, give the logits of a single forward."""
    tokens = prompts(length=60)
    expected = model(tokens, use_cache=False).logits
    for chunks in ([20] + [1] * 40, [7, 1, 13, 9, 1, 29], [60]):
        for cache in caches(model):
            found = [model(chunk, past_key_values=cache).logits for chunk in tokens.split(chunks, dim=1)]
            assert relative_error(torch.cat(found, dim=1), expected) < CLOSE, (chunks, type(cache))


@torch.no_grad()
def test_the_cache_is_small(model):
    """One global entry a set of K,V; the self-decoder's do not grow."""
    config, sizes = model.config, []
    for length in (40, 80):
        cache = DynamicCache(config=config)
        model(prompts(1, length), past_key_values=cache, logits_to_keep=1)
        sizes.append(cache_elements(cache))
    for length, size in zip((40, 80), sizes):
        entry = 2 * length * config.num_key_value_heads * config.head_dim
        assert size[3:] == {1: [entry, 0, 0], 2: [entry, 0, entry, 0]}[config.shared_kv_sets]
    assert sizes[0][:3] == sizes[1][:3]
    if config.self_decoder_mixers[0] == "gated_retention":
        assert sizes[0][0] == config.hidden_size * config.self_decoder_head_dim
        state = cache.layers[0].recurrent_states[0]
        assert state.dtype == torch.float32
    else:
        assert sizes[0][0] == 2 * (config.sliding_window - 1) * config.hidden_size


def test_state_stays_fp32_in_bf16(model):
    if model.config.self_decoder_mixers[0] == "gated_retention":
        cache = DynamicCache(config=model.config)
        model.bfloat16()(prompts(), past_key_values=cache)
        assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert model.bfloat16().model.self_rotary.inv_freq is not None


@torch.no_grad()
def test_early_exit(model):
    """At many lengths and paddings, with and without a cache that holds something already."""
    for length in (1, 2, 7, 8, 9, 37, 64, 130):
        tokens = prompts(3, length, seed=length)
        for pad in ("none", "left", "right"):
            mask = torch.ones_like(tokens)
            for row, missing in enumerate((0, length // 3, length // 2)):
                if pad == "left":
                    mask[row, :missing] = 0
                elif pad == "right" and missing:
                    mask[row, -missing:] = 0
            full = model(tokens, attention_mask=mask, use_cache=False).logits
            for kept in {1, 2, length - 1, length, length + 5} - {0}:
                exit_early = model(tokens, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
                expected, seen = full[:, -kept:], mask[:, -kept:].bool()
                assert exit_early.shape == expected.shape
                assert relative_error(exit_early[seen], expected[seen]) < CLOSE, (length, pad, kept)
            for cache in caches(model) if length > 2 else ():
                first = length // 2
                early = model(
                    tokens[:, :first], attention_mask=mask[:, :first], past_key_values=cache, logits_to_keep=1
                )
                seen = mask[:, first - 1].bool()
                assert relative_error(early.logits[seen, 0], full[seen, first - 1]) < CLOSE, (length, pad, type(cache))
                late = model(tokens[:, first:], attention_mask=mask, past_key_values=cache, logits_to_keep=2).logits
                seen = mask[:, -late.shape[1] :].bool()
                assert relative_error(late[seen], full[:, -late.shape[1] :][seen]) < CLOSE, (length, pad, type(cache))


@torch.no_grad()
def test_early_exit_with_masks_of_others(model):
    """A mask [b, 1, queries, keys] of the user's, and an attention that wants none."""
    tokens = prompts()
    mask = torch.ones(2, 1, PROMPT, PROMPT, dtype=torch.bool).tril()
    mask[..., 4:, 3] = False
    full = model(tokens, attention_mask=mask).logits
    assert relative_error(full, model(tokens).logits) > 0.01
    assert relative_error(model(tokens, attention_mask=mask, logits_to_keep=3).logits, full[:, -3:]) < CLOSE

    masks = []

    def attention(module, query, key, value, mask, **_):
        masks.append(mask)
        return query.transpose(1, 2), None

    AttentionInterface.register("maskless", attention)
    model.set_attn_implementation("maskless")
    for kept in (0, 1, 3):
        model(tokens, logits_to_keep=kept)
    assert masks and all(mask is None for mask in masks)


@torch.no_grad()
def test_early_exit_skips_the_cross_decoder(model):
    rows = []
    model.model.cross_layers[0].register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    greedy(model, prompts())
    assert rows == [1] * NEW
    model(prompts(), logits_to_keep=torch.tensor([3, 5]))
    assert rows[-1] == PROMPT  # arbitrary positions need all of them


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_is_uncached(model, beams, options):
    assert_same(model, prompts(), {"num_beams": beams, **options}, {"num_beams": beams, "use_cache": False})


@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_a_padded_row_is_the_row_alone(model, options):
    """Ragged prompts, padded on the left."""
    rows = [prompts(1, length, seed=length)[0] for length in (3, 17, 37)]
    longest = max(map(len, rows))
    batch = torch.stack([torch.cat((row.new_zeros(longest - len(row)), row)) for row in rows])
    options = options | {"output_logits": True, "return_dict_in_generate": True}
    together = greedy(model, batch, attention_mask=(batch != 0).long(), **options)
    for index, row in enumerate(rows):
        alone = greedy(model, row[None], **options)
        assert torch.equal(together.sequences[index, longest:], alone.sequences[0, len(row) :])
        found, expected = (torch.stack(each.logits) for each in (together, alone))
        assert relative_error(found[:, index], expected[:, 0]) < CLOSE


@torch.no_grad()
def test_padding_one_token_at_a_time(model):
    rows, length = prompts(2, 12), 12
    mask = torch.ones_like(rows)
    mask[0, :3] = 0
    positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), DynamicCache(config=model.config)
    steps = []
    for at in range(length):
        now = dict(attention_mask=mask[:, : at + 1], position_ids=positions[:, at, None], past_key_values=cache)
        steps.append(model(rows[:, at, None], **now).logits)
    assert relative_error(torch.cat(steps, 1)[0, 3:], model(rows[:1, 3:]).logits[0]) < CLOSE
    in_ones = greedy(model, rows, attention_mask=mask, **STATIC, prefill_chunk_size=1)
    assert torch.equal(in_ones, greedy(model, rows, attention_mask=mask))


@torch.no_grad()
def test_padding_leaves_the_state_alone(model):
    """Wherever it stands: it writes nothing and lets nothing decay."""
    if model.config.self_decoder_mixers[0] != "gated_retention":
        return
    rows, cache = prompts(2, 20), DynamicCache(config=model.config)
    mask = torch.ones_like(rows)
    mask[0, :5] = mask[1, 12:] = 0
    model(rows, attention_mask=mask, past_key_values=cache)
    for index, real in enumerate((rows[:1, 5:], rows[1:, :12])):
        alone = DynamicCache(config=model.config)
        positions = torch.arange(20)[None][mask[index, None] == 1][None]
        model(real, position_ids=positions, past_key_values=alone)
        for layer, kind in enumerate(model.config.layer_types[:3]):
            if kind != "linear_attention":
                continue
            states = [each.layers[layer].recurrent_states[0] for each in (cache, alone)]
            assert relative_error(states[0][index], states[1][0]) < CLOSE


def test_what_cannot_be_rolled_back_is_refused(model):
    if model.config.self_decoder_mixers[0] == "gated_retention":
        with pytest.raises(ValueError, match="assisted"):
            greedy(model, prompts(1), prompt_lookup_num_tokens=3)
    else:
        assert torch.equal(greedy(model, prompts(1), prompt_lookup_num_tokens=3), greedy(model, prompts(1)))


def test_bad_input(model):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    if "linear_attention" in model.config.layer_types:
        with pytest.raises(ValueError, match=r"make it with DynamicCache\(config=model.config\)"):
            model(prompts(), past_key_values=DynamicCache())
