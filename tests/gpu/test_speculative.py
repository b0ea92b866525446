"""Self-speculative generation on a GPU: the engine's passes of several tokens, and its CUDA graphs, behind a fixed text
that accepts some drafts. Tolerances as in test_inference.py."""

from functools import partial

import pytest
import torch
from gpu.test_inference import SIZES, TOLERANCE
from support.models import SELF_DECODERS, relative_error

pytest.importorskip("transformers")

from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference.speculative import SpeculativeEngine, SpeculativeModel, attach

pytestmark = pytest.mark.gpu


def build(kind: str, layers: int, dtype: torch.dtype) -> YocoForCausalLM:
    """Of few tokens, so that drafts are at times right."""
    torch.manual_seed(0)
    sizes = SIZES | dict(vocab_size=4, self_decoder_heads=2, sliding_window=100)
    sizes |= dict(mamba_num_heads=8, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=2)
    model = YocoForCausalLM(YocoConfig(**sizes, self_decoder=kind, mtp_num_layers=layers))
    attach(model)
    for layer in model.model.mtp_layers:
        layer.apply(model._init_weights)
    return model.to("cuda", dtype).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [*SELF_DECODERS, "RSM", "RSG"])
def test_logits_are_those_of_one_forward(kind: str, layers: int, dtype: torch.dtype) -> None:
    model = build(kind, layers, dtype)
    tokens = torch.randint(0, 4, (1, 300), generator=torch.Generator().manual_seed(1)).cuda()
    expected = model(tokens, use_cache=False).logits[0, 149:]
    for make in (SpeculativeModel, partial(SpeculativeEngine, max_length=400, capacity=128)):
        decoder = make(model)
        found = [decoder.prefill(tokens[:, :150])]
        found += [decoder.step(tokens[:, at]).clone() for at in range(150, 300)]
        error = relative_error(torch.cat(found), expected)
        print(f"{kind} {layers} {dtype} {type(decoder).__name__}: {error:.1e}, {decoder.accepted}/{decoder.verified}")
        assert error < TOLERANCE[dtype]
        assert 0 < decoder.accepted < decoder.verified
        if isinstance(decoder, SpeculativeEngine):
            assert 3 <= len(decoder.recorded) <= 3 + 2 * layers
