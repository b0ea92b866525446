"""Packed documents on one GPU: Transformer Engine's and torch's kernels against float32 torch, and no bit of a leak.

Tolerances as in test_transformer_engine.py.
"""

import pytest
import torch
from support.influence import model_influence
from support.models import (
    BF16,
    FULL_RECOMPUTE,
    SELF_DECODERS,
    SEQ,
    TE,
    VOCAB,
    WIDE_HEADS,
    batch,
    build,
    document_batch,
    plain_name,
    relative_error,
    tiny_config,
    train_step,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_process")]
PATHS = {"torch": BF16, "transformer engine": BF16 | TE}
LOSS, GRAD = 5e-3, 6e-2
# Of a gradient in bfloat16 whose sums run in another order: a last place (4e-3) in few of its elements.
GRAD_NOISE = 1e-3


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=["plain", "recompute full"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_equals_float32_torch(kind: str, path: str, recompute: dict) -> None:
    model = dict(self_decoder=kind, **WIDE_HEADS)
    reference = train_step(model, documents=True)
    result = train_step(model | PATHS[path] | recompute, documents=True)
    result = {plain_name(name): value for name, value in result.items()}
    assert relative_error(result["loss"], reference["loss"]) < LOSS
    for name in reference:
        if name.startswith("grad/"):
            error = relative_error(result[name], reference[name])
            assert error < GRAD, f"{name}: {error:.1e}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_another_document_changes_nothing(kind: str, path: str) -> None:
    """Tokens of the first document change: the others' logits stay, bit for bit, and their gradients; unmasked not.

    GRAD_NOISE, because attention kernels add gradients in an order that is not fixed: a repetition would differ too.
    The test below has no tolerance.
    """
    model = build(tiny_config(self_decoder=kind, **WIDE_HEADS, **PATHS[path])).bfloat16()
    tokens, labels = batch()
    ids = torch.zeros_like(tokens, dtype=torch.int32)
    ids[:, 19:], ids[:, 37:] = 1, 2
    changed = tokens.clone()
    changed[:, :19] = (changed[:, :19] + 1) % VOCAB

    def of_the_others(tokens: torch.Tensor, document_ids: torch.Tensor | None) -> tuple[torch.Tensor, dict]:
        model.zero_grad()
        logits = model(tokens, document_ids=document_ids)[:, 19:]
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels[:, 19:].flatten()).backward()
        return logits.detach(), {name: param.grad.clone() for name, param in model.named_parameters()}

    for document_ids, same in ((ids, True), (None, False)):
        (logits, gradients), (other_logits, other_gradients) = (
            of_the_others(each, document_ids) for each in (tokens, changed)
        )
        assert torch.equal(logits, other_logits) == same
        error = max(relative_error(other_gradients[name], gradients[name]) for name in gradients)
        assert error < GRAD_NOISE if same else error > 50 * GRAD_NOISE


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_no_gradient_crosses_a_document_boundary(kind: str, path: str, generator: torch.Generator) -> None:
    """Exactly zero, whatever the kernels' order: logits of a document, embeddings of another. Unmasked not."""
    model = build(tiny_config(self_decoder=kind, **WIDE_HEADS, **PATHS[path])).bfloat16()
    tokens, ids = batch(1)[0], document_batch(1)
    causal = torch.ones(SEQ, SEQ, dtype=torch.bool, device=ids.device).tril()
    within = causal & (ids[0][:, None] == ids[0][None])
    influenced = model_influence(model, tokens, generator, ids)
    assert not (influenced & ~within).any()
    assert influenced.diagonal().all() and (influenced & within).sum() > within.sum() / 2
    unmasked = model_influence(model, tokens, generator)
    assert (unmasked & ~within).any() and not (unmasked & ~causal).any()
