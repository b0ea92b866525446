"""Pipelines over NCCL with Transformer Engine in bf16 give the losses and gradients of one GPU.

Tolerance: the same layers run on the same values, but dK,dV are rounded to bf16 at a boundary (2^-9). FP8 has the same
scales from the same tensors, but that rounding may move an 8-bit value by one step (2^-3 in E5M2).
"""

import pytest
import torch
from support.models import SELF_DECODERS, relative_error
from support.pipeline import pipeline_step
from support.worlds import Cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("pipeline"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
MODEL = dict(
    transformer_impl="transformer_engine",
    apply_rope_fusion=True,
    bf16=True,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
)
FP8 = dict(hidden_size=256, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2, kv_channels=64)
MODELS = {kind: MODEL | {"self_decoder": kind} for kind in SELF_DECODERS} | {
    recipe: MODEL | FP8 | dict(fp8="e4m3" if recipe == "blockwise" else "hybrid", fp8_recipe=recipe)
    for recipe in ("delayed", "tensorwise", "blockwise")
}
LAYOUTS = {"PP2": "Ettt|tttttL", "PP2 VP2": "Ett|tt|tt|ttL"}
LOSS, GRAD, FP8_GRAD = 1e-3, 2e-2, 5e-2


@pytest.fixture(scope="module")
def one_gpu() -> Cases:
    return Cases(1, pipeline_step, {name: ((model, None, True), {}) for name, model in MODELS.items()})


@pytest.fixture(scope="module")
def two_gpus() -> Cases:
    cases = {}
    for mesh, layout in LAYOUTS.items():
        vp = (layout.count("|") + 1) // 2
        for name, model in MODELS.items():
            cases[mesh, name] = ((model, layout, True), dict(pp=2, vp=vp if vp > 1 else None))
    return Cases(2, pipeline_step, cases)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mesh", LAYOUTS)
def test_nccl_pipeline_equals_one_gpu(mesh: str, name: str, one_gpu: Cases, two_gpus: Cases) -> None:
    (reference,), results = one_gpu[name], two_gpus[mesh, name]
    merged = results[0] | results[1]
    assert merged.keys() == reference.keys()
    errors = {key: relative_error(value, reference[key]) for key, value in merged.items()}
    loss = errors.pop("loss")
    worst = max(errors, key=errors.get)
    print(f"{mesh} {name}: loss {loss:.1e}, worst gradient {worst} {errors[worst]:.1e}")
    assert loss < LOSS
    assert errors[worst] < (GRAD if name in SELF_DECODERS else FP8_GRAD), worst
