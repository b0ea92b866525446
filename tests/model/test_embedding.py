"""The embedding's gradient goes straight to Megatron's buffer: the gradients and weights of autograd's whole table."""

import pytest
import torch
from support.models import BF16, VOCAB, batch, build, relative_error, tiny_config, train_step

from yoco_megatron.model import yoco_model
from yoco_megatron.model.layers.embedding import GradAccumulatingEmbedding, can_accumulate_in_place

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("more", [{}, BF16], ids=["fp32", "bf16"])
def test_gradients_and_weights(more: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 the same but for the order of sums, 1e-6 of each norm. In bf16 the sum of a micro-batch's rows is not
    rounded any more, 2^-9 of each value; where that turns the sign of a tiny gradient, Adam's first step turns, too.
    Nothing else changes."""
    plain = train_step(more)
    buffers = []
    index_add = torch.Tensor.index_add_

    def noted(buffer: torch.Tensor, *args: object) -> torch.Tensor:
        buffers.append(buffer.shape)
        return index_add(buffer, *args)

    monkeypatch.setattr(torch.Tensor, "index_add_", noted)
    monkeypatch.setattr(yoco_model, "can_accumulate_in_place", lambda config, tied: not tied)
    ours = train_step(more)
    assert buffers == [(VOCAB, tiny_config().hidden_size)]
    for name, want in plain.items():
        limit = 2e-3 if more and "embedding" in name else 1e-6
        assert relative_error(ours[name], want) < limit, name


def test_micro_batches_add_up() -> None:
    """A token id more than once, and in both."""
    model = build(tiny_config()).train()
    table = model.embedding.word_embeddings
    tokens = [torch.tensor([[3, 5, 3]]), torch.tensor([[5, 7, 7]])]
    dy = [torch.randn(1, 3, tiny_config().hidden_size) for _ in tokens]
    want = torch.zeros_like(table.weight)
    for rows, gradient in zip(tokens, dy):
        for token, row in zip(rows[0], gradient[0]):
            want[token] += row
    GradAccumulatingEmbedding.convert(table)
    assert "(word_embeddings): GradAccumulatingEmbedding" in repr(model)
    table.weight.main_grad = torch.zeros_like(table.weight)
    for rows, gradient in zip(tokens, dy):
        table(rows).backward(gradient)
    assert table.weight.grad_added_to_main_grad
    torch.testing.assert_close(table.weight.main_grad, want)


def test_without_a_buffer_or_gradients_it_is_megatrons() -> None:
    model = build(tiny_config()).train()
    table = model.embedding.word_embeddings
    tokens, _ = batch(2)
    before = table(tokens)
    GradAccumulatingEmbedding.convert(table)
    after = table(tokens)
    assert torch.equal(before, after) and type(after.grad_fn) is type(before.grad_fn)
    table.weight.main_grad = torch.zeros_like(table.weight)
    with torch.no_grad():
        assert torch.equal(table(tokens), before)
    table.weight.main_grad = torch.zeros_like(table.weight).bfloat16()  # sums of 8 bits would lose rows
    assert type(table(tokens).grad_fn) is type(before.grad_fn)


@pytest.mark.parametrize(
    ("change", "tied", "fits"),
    [
        ({}, False, True),
        ({}, True, False),
        (dict(tensor_model_parallel_size=2), False, False),
        (dict(deterministic_mode=True), False, False),
    ],
)
def test_where_it_accumulates_in_place(change: dict, tied: bool, fits: bool) -> None:
    config = tiny_config(**change)
    assert not can_accumulate_in_place(config, tied), "only with fused gradients"
    config.gradient_accumulation_fusion = True
    assert can_accumulate_in_place(config, tied) == fits
