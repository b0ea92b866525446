"""Packed documents do not influence each other: not a bit of one changes the logits or the gradients of another.

Float64. What must be zero is compared with zero; what must be equal up to the order of sums, to 1e-12.
"""

import pytest
import torch
from support.models import FULL_RECOMPUTE, SELF_DECODERS, VOCAB, build, tiny_config

from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.training.batch import document_ids

pytestmark = pytest.mark.usefixtures("one_process")
TOKENS, WINDOW = 40, 7
# Lengths of the documents of each sample: of one token, shorter and longer than the window and than a chunk of 16.
PACKS = [[9, 1, 22, 8], [40], [1, 1, 38]]
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])


def ids_of(packs: list[list[int]]) -> torch.Tensor:
    lengths = [torch.tensor(pack) for pack in packs]
    return torch.stack([torch.arange(len(pack)).repeat_interleave(pack) for pack in lengths]).int()


def model_of(kind: str, **overrides) -> YOCOModel:
    return build(tiny_config(self_decoder=kind, self_decoder_window=WINDOW, params_dtype=torch.float64, **overrides))


def tokens(generator: torch.Generator, batch: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, TOKENS), generator=generator)


def gradients(model: YOCOModel, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [param.grad.clone() for param in model.parameters()]


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE, SELECTIVE], ids=["", "recompute full", "selective"])
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_a_packed_document_is_the_document_alone(kind, recompute, generator):
    """Logits and the gradients of every parameter: packs of several samples against one run per document."""
    model = model_of(kind, **recompute).train()
    ids, packed = tokens(generator, len(PACKS)), ids_of(PACKS)
    direction = torch.randn(len(PACKS), TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    logits = model(ids, document_ids=packed)
    alone = torch.cat(
        [
            torch.cat([model(document[None]) for document in sample.split(lengths)], dim=1)
            for sample, lengths in zip(ids, PACKS)
        ]
    )
    torch.testing.assert_close(logits, alone, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(
        gradients(model, (logits * direction).sum()), gradients(model, (alone * direction).sum()), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_another_document_changes_nothing(kind, masked, generator):
    """Documents A B C in one pack; A and C get other tokens. Without masking B notices A, so the test can fail."""
    model = model_of(kind)
    lengths = [11, 17, 12]
    a, b = slice(0, 11), slice(11, 28)
    packed = ids_of([lengths]) if masked else None
    ids = tokens(generator, 1)
    changed = (ids + 1) % VOCAB
    changed[:, b] = ids[:, b]
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))

    def logits_and_gradients_of_b(ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        logits = model(ids, document_ids=packed)[:, b]
        loss = logits.square().sum()
        body = [param for name, param in model.named_parameters() if "embedding" not in name]
        of_body = torch.autograd.grad(loss, body, retain_graph=True)
        (of_inputs,) = torch.autograd.grad(loss, embedded[-1])
        return logits, of_body, of_inputs

    logits, of_body, of_inputs = logits_and_gradients_of_b(ids)
    other_logits, other_of_body, _ = logits_and_gradients_of_b(changed)
    unchanged = torch.equal(logits, other_logits) and all(map(torch.equal, of_body, other_of_body))
    reaches_a = bool((of_inputs[a] != 0).any())
    assert (unchanged, reaches_a) == (masked, not masked)
    assert (of_inputs[b] != 0).flatten(1).any(1).all()
    assert not (of_inputs[b.stop :] != 0).any()


def test_positions_are_counted_in_each_document():
    shard = SequenceShard(TOKENS, len(PACKS), ids_of(PACKS))
    wanted = torch.stack([torch.cat([torch.arange(length) for length in pack]) for pack in PACKS])
    assert torch.equal(shard.positions().t(), wanted)


def test_document_ids_of_padded_cu_seqlens():
    """GPTDataset repeats the sequence's length to the end of cu_seqlens."""
    padded = torch.full((len(PACKS), TOKENS + 1), TOKENS, dtype=torch.int32)
    for row, pack in zip(padded, PACKS):
        row[: len(pack) + 1] = torch.tensor([0, *pack]).cumsum(0)
    ids = document_ids(padded, TOKENS)
    assert ids.dtype == torch.int32
    assert torch.equal(ids, ids_of(PACKS))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="document_ids must be of shape"):
        model_of("sliding_window")(torch.zeros(1, TOKENS, dtype=torch.long), document_ids=ids_of(PACKS))
