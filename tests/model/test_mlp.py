"""The MLP in chunks: the same outputs and gradients (float64, 1e-12), and one wide activation at a time."""

import pytest
import torch
from support.models import FULL_RECOMPUTE, VOCAB, build, tiny_config

pytestmark = pytest.mark.usefixtures("one_process")
TOKENS, CHUNKS = 23, 4


def run(generator_seed: int = 4, **overrides) -> tuple[list[torch.Tensor], list[int]]:
    """(logits and gradients, tokens of each wide activation that autograd saved)."""
    config = tiny_config(params_dtype=torch.float64, **overrides)
    model = build(config).train()
    ids = torch.randint(0, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(generator_seed))
    saved = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 3 and tensor.shape[-1] == config.ffn_hidden_size:
            saved.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(ids)
    logits.square().sum().backward()
    return [logits.detach(), *(param.grad for param in model.parameters())], saved


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE], ids=["", "recompute full"])
def test_chunks_change_nothing(recompute: dict) -> None:
    whole, _ = run()
    chunked, _ = run(mlp_chunks_for_training=CHUNKS, **recompute)
    for got, wanted in zip(chunked, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_forward_keeps_nothing_wide() -> None:
    _, saved = run()
    assert TOKENS in saved
    _, saved = run(mlp_chunks_for_training=CHUNKS)
    assert saved == []
