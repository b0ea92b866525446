"""Multi-token prediction: the loss and every gradient of an independent float64 model, and no look ahead.

Tolerance 1e-11 of each tensor's norm: float64 sums in another order (the loss in chunks is float64 throughout).
"""

import pytest
import torch
from model.test_yoco_model import build_float64, compare, gradients, leaves, random_batch, sizes_of
from support import reference_model
from support.models import SELF_DECODERS, document_batch, later_labels, relative_error, tiny_config
from support.models import batch as batch_of

from yoco_megatron.training.batch import labels_later

EXACT = 1e-11
pytestmark = pytest.mark.usefixtures("one_process")
CASES = {
    "retention, tied": (True, dict(mtp_num_layers=1)),
    "two layers, windows, two sets of K,V, QK-norm and biases": (
        False,
        dict(mtp_num_layers=2, self_decoder="sliding_window", shared_kv_sets=2, qk_layernorm=True, add_qkv_bias=True),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, generator: torch.Generator) -> None:
    tied, overrides = CASES[case]
    model = build_float64(tied, generator, loss_chunk_size=5, **overrides).train()
    sizes, weights = sizes_of(model.config), leaves(model)
    tokens, labels = random_batch(generator)
    later = later_labels(model.config, labels)
    losses = model(tokens, labels=labels, later_labels=later)
    w = reference_model.weights_from_yoco(weights, sizes)
    logits = [
        reference_model.logits(w, tokens, sizes),
        *reference_model.mtp_logits(w, tokens, labels, sizes, model.config.mtp_num_layers),
    ]
    assert losses.shape == (len(logits), *labels.shape)
    total, wanted = torch.zeros(()), torch.zeros(())
    for depth, (of_term, its_logits) in enumerate(zip(losses, logits)):
        positions = labels.shape[1] - depth
        assert not of_term[:, positions:].any()
        mean = of_term[:, :positions].mean()
        reference = reference_model.mean_loss(its_logits[:, :positions], labels[:, depth:])
        assert relative_error(mean, reference) < EXACT
        total, wanted = total + 0.3**depth * mean, wanted + 0.3**depth * reference
    total.backward()
    wanted = torch.autograd.grad(wanted, list(weights.values()))
    compare(gradients(model), dict(zip(weights, wanted)), EXACT)


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_sees_no_later_token(kind: str, generator: torch.Generator) -> None:
    """The loss at i reads tokens up to i + 1 of its document as inputs, and t_(i + 2) as a label alone."""
    model = build_float64(False, generator, mtp_num_layers=1, self_decoder=kind)
    tokens, labels = batch_of(1)
    ids = document_batch(1)  # documents begin at 12 and 36
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    for at in (5, 10, 20):
        later = torch.full_like(labels, -1)
        later[0, at] = labels[0, at + 1]
        loss = model(tokens, labels=labels, document_ids=ids, later_labels=later[None])[1].sum()
        of_tokens, of_next = torch.autograd.grad(loss, embedded[-2:])
        first = 12 if at >= 12 else 0
        assert of_tokens.flatten(1).any(1).nonzero().flatten().tolist() == list(range(first, at + 1))
        assert of_next.flatten(1).any(1).nonzero().flatten().tolist() == [at]


def test_where_there_is_a_loss() -> None:
    """The label that many places on, of the same document, where it and all before it have a loss: without one a label
    is -1, and what the next layer takes for a token is not that of the text."""
    labels = torch.arange(10, 18)[None]
    mask = torch.tensor([[1.0, 1, 1, 0, 1, 0.5, 1, 1]])
    ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    assert labels_later(labels, mask, None, 1).tolist() == [[11, 12, -1, 14, 15, 16, 17, -1]]
    assert labels_later(labels, mask, ids, 1).tolist() == [[11, 12, -1, 14, -1, 16, 17, -1]]
    assert labels_later(labels, mask, ids, 2).tolist() == [[12, -1, -1, -1, -1, 17, -1, -1]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(num_moe_experts=4, moe_ffn_hidden_size=32), "--mtp-num-layers 1 is not built for --num-experts"),
        (dict(fp8="hybrid", fp8_recipe="delayed"), "does not go with --fp8-recipe delayed"),
        (dict(mtp_loss_scaling_factor=0.0), "--mtp-loss-scaling-factor 0.0 must be positive"),
    ],
)
def test_what_is_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(mtp_num_layers=1, **overrides)
