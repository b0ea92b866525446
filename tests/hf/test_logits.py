"""The transformers model computes what the trainer and an independent float64 YOCO compute, for copied weights.

Tolerances, relative to the norm of the logits:
- float64 1e-11: sums in another order over four layers.
- float32 2e-6: some forty roundings of 6e-8, as a random walk.
- bfloat16 3e-2: the same forty of 2^-9 = 2e-3, on both sides.
"""

import pytest
import torch
from model.test_yoco_model import CASES, TOKENS, build_float64, leaves, random_batch, sizes_of
from support import reference_model
from support.exported import twin
from support.models import SELF_DECODERS, build, relative_error, tiny_config

EXACT, FP32, BF16 = 1e-11, 2e-6, 3e-2
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_trainer_and_the_reference(case: str, tied: bool, generator: torch.Generator) -> None:
    model = build_float64(tied, generator, **CASES[case])
    tokens, _ = random_batch(generator)
    sizes = sizes_of(model.config)
    expected = reference_model.logits(reference_model.weights_from_yoco(leaves(model), sizes), tokens, sizes)
    with torch.no_grad():
        logits = twin(model)(tokens, use_cache=False).logits
        assert logits.dtype == torch.float64 and logits.shape == (3, TOKENS, model.vocab_size)
        assert relative_error(logits, model(tokens)) < EXACT
    assert relative_error(logits, expected) < EXACT


@pytest.mark.parametrize("kind", [*SELF_DECODERS, "mamba2", "gated_delta_net"])
def test_float32_and_bfloat16(kind: str, generator: torch.Generator) -> None:
    tokens, _ = random_batch(generator)
    for dtype, tolerance in ((torch.float32, FP32), (torch.bfloat16, BF16)):
        model = build(tiny_config(self_decoder=kind, params_dtype=dtype, bf16=dtype == torch.bfloat16))
        with torch.no_grad():
            logits = twin(model)(tokens, use_cache=False).logits
            assert logits.dtype == dtype
            assert relative_error(logits, model(tokens)) < tolerance


@pytest.mark.parametrize("kind", SELF_DECODERS)
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations(kind: str, implementation: str, generator: torch.Generator) -> None:
    model = twin(build(tiny_config(self_decoder=kind)))
    tokens, _ = random_batch(generator)
    with torch.no_grad():
        expected = model(tokens).logits
        model.set_attn_implementation(implementation)
        assert relative_error(model(tokens).logits, expected) < FP32
        assert relative_error(model(tokens, logits_to_keep=3).logits, expected[:, -3:]) < FP32


@pytest.mark.parametrize(
    ("kind", "sets"),
    [*((kind, 1) for kind in SELF_DECODERS), ("sliding_window", 2), ("mamba2", 1), ("GR", 1), ("MS GA", 1)],
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients(kind: str, sets: int, reentrant: bool, generator: torch.Generator) -> None:
    """Loss and gradients equal the trainer's, plain and with gradient checkpointing."""
    kind, _, pattern = kind.partition(" ")
    both = dict(qk_layernorm=sets > 1, add_qkv_bias=sets > 1, cross_decoder_pattern=pattern or None)
    ours = build(tiny_config(self_decoder=kind, shared_kv_sets=sets, **both))
    tokens, _ = random_batch(generator)
    model = twin(ours).train()
    ours(tokens[:, :-1], labels=tokens[:, 1:].contiguous()).mean().backward()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        gradients.append({name: param.grad.clone() for name, param in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < FP32, name
    embedding = ours.embedding.word_embeddings.weight.grad
    assert relative_error(gradients[0]["model.embed_tokens.weight"], embedding) < 10 * FP32
