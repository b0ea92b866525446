"""Context parallelism over NCCL on two GPUs gives the loss and the gradients of one GPU.

In float32 with torch's layers: 1e-4 of each tensor's norm, for sums in another order and atomics. In bf16 with
Transformer Engine against float32 on one GPU, as in test_transformer_engine.py: a few percent of roundings.
"""

import pytest
import torch
from support.models import FULL_RECOMPUTE, SELF_DECODERS, relative_error
from support.pipeline import pipeline_step
from support.worlds import run_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
# Heads of width 64, which every kernel takes. Windows shorter and longer than the chunks of 12 tokens.
SIZES = dict(hidden_size=256, num_attention_heads=4, num_query_groups=2, self_decoder_heads=4)
WINDOWS = {"gated_retention": [7], "sliding_window": [7, 17]}
BF16 = dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
PATHS = {
    "float32 torch": ({}, 1e-5, 1e-4),
    "bf16 torch": (BF16, 5e-3, 6e-2),
    "bf16 transformer engine": (
        BF16 | dict(transformer_impl="transformer_engine", apply_rope_fusion=True),
        5e-3,
        6e-2,
    ),
    "bf16 transformer engine, recompute": (
        BF16 | FULL_RECOMPUTE | dict(transformer_impl="transformer_engine", apply_rope_fusion=True),
        5e-3,
        6e-2,
    ),
}
FUSED = {
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q.layer_norm_weight": "input_layernorm.weight",
    "shared_kv.linear_kv.layer_norm_weight": "shared_kv.layernorm.weight",
}
CASES = [(kind, window) for kind in SELF_DECODERS for window in WINDOWS[kind]]


def plain_name(name: str) -> str:
    """The name of a norm fused into a linear, in a model whose norms stand apart."""
    for fused, apart in FUSED.items():
        name = name.replace(fused, apart)
    return name


@pytest.fixture(scope="module")
def one_gpu():
    """Float32 on one GPU, computed once for each case."""
    done: dict = {}

    def step(kind: str, window: int, documents: bool) -> dict:
        if (kind, window, documents) not in done:
            model = SIZES | dict(self_decoder=kind, self_decoder_window=window)
            done[kind, window, documents] = run_world(1, pipeline_step, model, None, False, 2, False, documents)[0]
        return done[kind, window, documents]

    return step


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "window"), CASES)
def test_two_gpus_equal_one(kind: str, window: int, path: str, documents: bool, one_gpu) -> None:
    overrides, loss, grad = PATHS[path]
    model = SIZES | dict(self_decoder=kind, self_decoder_window=window) | overrides
    results = run_world(2, pipeline_step, model, None, False, 2, False, documents, cp=2)
    reference = one_gpu(kind, window, documents)
    for result in results:
        result = {plain_name(name): value for name, value in result.items()}
        assert result.keys() == reference.keys()
        errors = {name: relative_error(value, reference[name]) for name, value in result.items()}
        worst = max(errors, key=errors.get)
        print(f"{kind} {window} {path}: loss {errors['loss']:.1e}, worst gradient {worst} {errors[worst]:.1e}")
        for name, error in errors.items():
            assert error < (loss if name == "loss" else grad), f"{name}: relative error {error:.1e}"


def long_step(kind: str, documents: bool) -> dict:
    """4096 tokens a sequence: chunks of 1024, larger than any kernel's tile, with a window of 512."""
    from support import models, pipeline

    models.SEQ = pipeline.SEQ = 4096
    models.BORDERS = ([1024, 3072], [1023, 1025, 2500])
    overrides, _, _ = PATHS["bf16 transformer engine"]
    return pipeline_step(
        SIZES | overrides | dict(self_decoder=kind, self_decoder_window=512, num_layers=4),
        None,
        False,
        1,
        False,
        documents,
    )


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_long_sequences(kind: str, documents: bool) -> None:
    """Both in bf16, so that twice its noise is allowed."""
    reference = run_world(1, long_step, kind, documents)[0]
    for result in run_world(2, long_step, kind, documents, cp=2):
        for name, value in result.items():
            error = relative_error(value, reference[name])
            assert error < (5e-3 if name == "loss" else 6e-2), f"{name}: relative error {error:.1e}"
