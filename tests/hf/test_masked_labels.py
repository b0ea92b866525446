"""In training, an exported model computes the cross-decoder from the first label that is not -100 on, and no less."""

import pytest
import torch
from support.exported import small_config
from support.models import SELF_DECODERS

from yoco_megatron.hf.modeling_yoco import YocoForCausalLM, positions_from_first_loss

LENGTH, PROMPT = 20, 13


@pytest.fixture
def model(request: pytest.FixtureRequest) -> YocoForCausalLM:
    torch.manual_seed(1)
    kind, _, sets = request.param.partition(", sets ")
    return YocoForCausalLM(small_config(kind, shared_kv_sets=int(sets or 1))).double().train()


def loss_and_gradients(
    model: YocoForCausalLM, tokens: torch.Tensor, labels: torch.Tensor, **more
) -> list[torch.Tensor]:
    model.zero_grad()
    out = model(tokens, labels=labels, use_cache=False, **more)
    out.loss.backward()
    return [out.loss.detach(), *(param.grad.clone() for param in model.parameters())]


@pytest.mark.parametrize("model", [*SELF_DECODERS, "gated_retention, sets 2"], indirect=True)
@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradients_are_those_of_all_positions(model: YocoForCausalLM, padded: bool) -> None:
    tokens = torch.randint(0, 64, (2, LENGTH))
    labels = tokens.clone()
    labels[0, :PROMPT] = labels[1, : PROMPT + 3] = -100
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    more = dict(attention_mask=mask) if padded else {}
    rows = []
    model.model.cross_layers[0].register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[1]))
    some = loss_and_gradients(model, tokens, labels, **more)
    model.cross_decoder_positions = "all"
    every = loss_and_gradients(model, tokens, labels, **more)
    assert rows == [LENGTH - PROMPT + 1, LENGTH]
    for ours, reference in zip(some, every, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-7)  # transformers takes the loss in float32


@pytest.mark.parametrize("model", ["sliding_window"], indirect=True)
def test_evaluation_returns_all_logits(model: YocoForCausalLM) -> None:
    labels = torch.full((1, LENGTH), -100)
    labels[:, -2:] = 3
    assert model.eval()(labels.clamp(min=0), labels=labels).logits.shape[1] == LENGTH


def test_where_the_first_loss_is() -> None:
    labels = torch.full((2, 8), -100)
    assert positions_from_first_loss(labels) == 1
    labels[1, 0] = 5  # no position predicts the first token
    assert positions_from_first_loss(labels) == 1
    labels[1, 7] = 5
    assert positions_from_first_loss(labels) == 2
    labels[0, 1] = 5
    assert positions_from_first_loss(labels) == 8
