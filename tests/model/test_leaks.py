"""Which tokens influence which in the model, by gradients (support/influence.py), in float64, without a tolerance."""

import pytest
import torch
from support.influence import influence, model_influence
from support.models import SELF_DECODERS, VOCAB, build, tiny_config

from yoco_megatron.parallel.context.sequence_shard import SequenceShard

pytestmark = pytest.mark.usefixtures("one_process")
TOKENS, WINDOW = 23, 7
SPLITS = [0, 1, 2, 3]


def tokens(generator: torch.Generator, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, TOKENS), generator=generator)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_every_earlier_token_and_no_later_one(kind, split, generator):
    config = tiny_config(
        self_decoder=kind, num_self_decoder_layers=split, self_decoder_window=WINDOW, params_dtype=torch.float64
    )
    influenced = model_influence(build(config), tokens(generator), generator)
    assert torch.equal(influenced, torch.ones_like(influenced).tril())


def test_full_recompute_leaks_nothing(generator):
    config = tiny_config(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1, params_dtype=torch.float64
    )
    model = build(config)
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = model.train()(tokens(generator))
    at = TOKENS // 2
    embedded[0].retain_grad()
    logits[0, at].square().sum().backward()
    assert torch.equal((embedded[0].grad != 0).flatten(1).any(1), torch.arange(TOKENS) <= at)


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_sequences_of_a_batch_are_strangers(kind, generator):
    model = build(tiny_config(self_decoder=kind, params_dtype=torch.float64))
    ids = tokens(generator, batch=3)
    changed = ids.clone()
    changed[1] = (changed[1] + 1) % VOCAB
    same = (model(ids) == model(changed)).flatten(1).all(1)
    assert same.tolist() == [True, False, True]


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_logits_do_not_depend_on_later_tokens(kind, generator):
    """The same without gradients: a prefix has the logits that it has in the whole sequence.

    1e-12: blocks and chunks are cut elsewhere, so sums run in another order.
    """
    model = build(tiny_config(self_decoder=kind, params_dtype=torch.float64))
    ids = tokens(generator)
    whole = model(ids)
    for length in (1, WINDOW, TOKENS - 1):
        torch.testing.assert_close(model(ids[:, :length]), whole[:, :length], rtol=1e-12, atol=1e-12)


def self_decoder_influence(layers: int, window: int, kind: str, generator: torch.Generator) -> torch.Tensor:
    """Influence of inputs on outputs of the first `layers` self-decoder layers."""
    config = tiny_config(
        self_decoder=kind, num_self_decoder_layers=3, self_decoder_window=window, params_dtype=torch.float64
    )
    model = build(config)
    inputs = torch.randn(TOKENS, 1, config.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    hidden = inputs
    whole = SequenceShard(TOKENS, 1)
    for layer in model.decoder.layers[:layers]:
        hidden, _ = layer(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=model.self_rotary(TOKENS),
            packed_seq_params=whole,
        )
    return influence(inputs, hidden[:, 0], generator)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("window", [2, WINDOW, TOKENS, TOKENS + 4])
def test_windowed_layers_attend_to_exactly_their_window(window, layers, generator):
    """C keys, the query's own included; each further layer reaches C - 1 farther."""
    influenced = self_decoder_influence(layers, window, "sliding_window", generator)
    reach = layers * (window - 1) + 1
    assert torch.equal(influenced, torch.ones_like(influenced).tril().triu(1 - reach))
    assert torch.equal(influenced.sum(1), torch.arange(1, TOKENS + 1).clamp(max=reach))


def test_one_retention_layer_reads_everything_earlier(generator):
    influenced = self_decoder_influence(1, WINDOW, "gated_retention", generator)
    assert torch.equal(influenced, torch.ones_like(influenced).tril())


def test_the_shared_kv_come_from_the_self_decoder_alone(generator):
    """With windows in the self-decoder the K,V of position j hold tokens of its windows and no others."""
    config = tiny_config(self_decoder="sliding_window", self_decoder_window=WINDOW, params_dtype=torch.float64)
    model = build(config)
    embedded, shared = [], []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    model.decoder.shared_kv.register_forward_hook(lambda module, args, output: shared.extend(output))
    model(tokens(generator))
    assert len(shared) == 1, "one K,V for the whole model"
    influenced = influence(embedded[0], shared[0][:, 0], generator)
    reach = config.num_self_decoder_layers * (WINDOW - 1) + 1
    assert torch.equal(influenced, torch.ones_like(influenced).tril().triu(1 - reach))


@pytest.mark.parametrize("group", [0, 1])
def test_a_set_of_kv_serves_its_own_layers(group, generator):
    """A set whose layers attend in vain gets no gradient, and the other one does."""
    config = tiny_config(num_self_decoder_layers=0, shared_kv_sets=2, params_dtype=torch.float64)
    model = build(config)
    for layer in model.decoder.layers[2 * group :][:2]:
        torch.nn.init.zeros_(layer.self_attention.linear_proj.weight)
    model(tokens(generator)).square().sum().backward()
    gradient = model.decoder.shared_kv.linear_kv.weight.grad
    of_sets = gradient.unflatten(0, (config.num_query_groups, 2, -1)).transpose(0, 1).flatten(1)
    assert (of_sets != 0).any(1).tolist() == [group != 0, group != 1]


def test_the_probe_finds_a_leak(generator):
    """A key one position too late would be found."""
    inputs = torch.randn(5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    leaking = inputs.cumsum(0) + inputs.roll(-1, 0) * 1e-30
    influenced = influence(inputs, leaking, generator)
    assert torch.equal(influenced[:-1], torch.ones(5, 5, dtype=torch.bool).tril(1)[:-1])
