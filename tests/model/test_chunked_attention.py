"""Attention of a whole sequence reads the very queries that it gets, and hands on what the kernel writes."""

import pytest
import torch
from support.models import SELF_DECODERS, build, tiny_config
from torch import Tensor

from yoco_megatron.model.layers.chunked_attention import ChunkedAttention

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_a_whole_sequence_is_not_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk or slice of all is the same memory, but its backward copies the gradient."""
    of_layers: list[tuple[Tensor, Tensor]] = []
    of_kernels: list[tuple[Tensor, Tensor]] = []
    attend = ChunkedAttention.attend

    def recording(self: ChunkedAttention, query: Tensor, *args: object) -> Tensor:
        of_layers.append((query, attend(self, query, *args)))
        return of_layers[-1][1]

    monkeypatch.setattr(ChunkedAttention, "attend", recording)
    model = build(tiny_config(self_decoder=kind))
    for module in model.modules():
        if isinstance(module, ChunkedAttention):
            module.core_attention.register_forward_hook(lambda _, args, out: of_kernels.append((args[0], out)))
    model(torch.zeros(2, 9, dtype=torch.long))
    attentions = sum(isinstance(module, ChunkedAttention) for module in model.modules())
    assert len(of_layers) == attentions >= 2
    assert [(id(q), id(out)) for q, out in of_kernels] == [(id(q), id(out)) for q, out in of_layers]
