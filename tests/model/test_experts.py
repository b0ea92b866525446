"""Mixtures of experts in a YOCO's layers: what they compute, for which tokens, and on which tokens it depends."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from support.influence import model_influence
from support.models import EXPERTS, SELF_DECODERS, SEQ, VOCAB, batch, build, relative_error, tiny_config

from yoco_megatron.config.experts import layers_with_experts
from yoco_megatron.costs.shape import ModelShape, active_parameters, parameter_count

pytestmark = pytest.mark.usefixtures("one_process")
EXACT = dict(params_dtype=torch.float64, moe_router_dtype="fp64")
BIAS = dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
WITHOUT_LOSS = dict(moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, moe_z_loss_coeff=None)


def swiglu_of(expert: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ expert.linear_fc1.weight.T).chunk(2, -1)
    return (F.silu(gate) * up) @ expert.linear_fc2.weight.T


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_weighted_sum_of_its_experts(bias, generator):
    """Against a loop over tokens, in float64: 5e-7 of the norm, as Megatron takes scores in fp32."""
    model = build(tiny_config(**EXPERTS | EXACT | (BIAS if bias else {}) | WITHOUT_LOSS))
    layer = model.decoder.layers[2].mlp
    x = torch.randn(11, 2, 64, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for place in torch.cartesian_prod(torch.arange(11), torch.arange(2)).tolist():
        token = x[*place]
        logits = token @ layer.router.weight.T
        if bias:
            layer.router.expert_bias.copy_(torch.tensor([0.0, 5.0, 0.0, -5.0]))
            scores = logits.sigmoid()
            chosen = (scores + layer.router.expert_bias).topk(2).indices
            weights = scores[chosen] / scores[chosen].sum()
        else:
            top = logits.topk(2)
            chosen, weights = top.indices, top.values.softmax(0)
        routed = [w * swiglu_of(layer.experts.local_experts[e], token) for w, e in zip(weights, chosen.tolist())]
        expected[*place] = sum(routed) + swiglu_of(layer.shared_experts, token)
    assert relative_error(layer(x)[0], expected) < 5e-7


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_routing_depends_on_no_later_token(kind, generator):
    model = build(tiny_config(self_decoder=kind, **EXPERTS | EXACT | WITHOUT_LOSS))
    influenced = model_influence(model, torch.randint(0, VOCAB, (1, 23), generator=generator), generator)
    assert torch.equal(influenced, torch.ones_like(influenced).tril())


def test_balancing_losses_are_of_the_positions_that_are_computed(generator):
    """With a loss at the last positions alone the cross-decoder's routers see these, and balance these; the
    self-decoder's see all. Against the formula of the Switch Transformer (arXiv 2101.03961, equation 4)."""
    model = build(tiny_config(**EXPERTS | dict(moe_router_load_balancing_type="aux_loss"))).train()
    seen: dict[int, torch.Tensor] = {}
    for layer in model.decoder.layers:
        layer.mlp.router.register_forward_hook(
            lambda router, args, _: seen.update({router.layer_number: args[0].detach()})
        )
    tokens, labels = batch(2)
    last = 10
    get_moe_metrics_tracker().clear()
    model(tokens, labels=labels[:, -last:], query_runs=((SEQ - last, SEQ),))
    reported = get_moe_metrics_tracker().metrics["load_balancing_loss"].values
    for index, layer in enumerate(model.decoder.layers):
        x = seen[index + 1]
        assert x.shape[:2] == (SEQ if index < 2 else last, 2)
        scores = (x.flatten(0, 1) @ layer.mlp.router.weight.T).softmax(-1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1)
        expected = 4 * (chosen.mean(0) / 2 * scores.mean(0)).sum()
        assert reported[index].item() == pytest.approx(expected.item(), rel=1e-5)  # fp32
    get_moe_metrics_tracker().clear()


def test_which_layers_have_experts():
    for freq, expected in ((1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), ([0, 1, 1, 0], [0, 1, 1, 0])):
        model = build(tiny_config(**EXPERTS, moe_layer_freq=freq))
        assert [isinstance(layer.mlp, MoELayer) for layer in model.decoder.layers] == [bool(has) for has in expected]
        assert layers_with_experts(4, freq, 4) == [bool(has) for has in expected]


@pytest.mark.parametrize("freq", [1, (0, 1, 1, 0), (0, 0, 0, 1)])
@pytest.mark.parametrize("gate", [False, True])
def test_parameters_are_counted(freq, gate):
    config = tiny_config(
        **EXPERTS | dict(moe_layer_freq=freq if freq == 1 else list(freq), moe_shared_expert_gate=gate)
    )
    shape = ModelShape(
        architecture="yoco",
        seq_length=SEQ,
        tied=False,
        padded_vocab_size=VOCAB,
        num_experts=4,
        moe_layer_freq=freq,
        **{
            name: getattr(config, name)
            for name in ModelShape.__dataclass_fields__
            if hasattr(config, name) and name not in ("architecture", "num_experts", "moe_layer_freq")
        },
    )
    model = build(config)
    assert sum(parameter_count(shape).values()) == sum(p.numel() for p in model.parameters())
    layers = 4 if freq == 1 else sum(freq)
    inactive = layers * (4 - 2) * 3 * 64 * 32
    assert active_parameters(shape) == sum(p.numel() for p in model.parameters()) - inactive
