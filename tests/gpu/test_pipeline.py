"""Pipelines over NCCL with Transformer Engine, in bf16 and FP8, give the losses and gradients of one GPU.

Tolerance: the same layers run on the same values, but dK,dV are rounded to bf16 at a boundary (2^-9). In FP8 that
rounding moves some 8-bit values by a whole step (2^-3 in E5M2); it must add less than FP8 itself adds to bf16's
gradients. With --fp32-kv-transport nothing is rounded and FP8 has bf16's tolerance.
"""

from functools import partial

import pytest
import torch
from support.models import BF16, SELF_DECODERS, TE, relative_error
from support.pipeline import pipeline_step
from support.worlds import Cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("pipeline"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
MODEL = TE | BF16
FP8 = dict(hidden_size=256, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2, kv_channels=64)
RECIPES = {
    recipe: MODEL | FP8 | dict(fp8="e4m3" if recipe == "blockwise" else "hybrid", fp8_recipe=recipe)
    for recipe in ("delayed", "tensorwise", "blockwise")
}
MODELS = {kind: MODEL | {"self_decoder": kind} for kind in SELF_DECODERS}
MODELS |= RECIPES | {f"{name}, fp32 transport": RECIPES[name] | dict(fp32_kv_transport=True) for name in RECIPES}
TWO_SETS = dict(shared_kv_sets=2)
MODELS |= {
    "two sets of K,V": MODEL | TWO_SETS,
    "QK-norm and biases, two sets of K,V": MODEL | TWO_SETS | dict(qk_layernorm=True, add_qkv_bias=True),
    "delayed, fp32 transport, two sets of K,V": MODELS["delayed, fp32 transport"] | TWO_SETS,
}
SAME_IN_BF16 = "bf16, the size of FP8's"
LAYOUTS = {"PP2": "Ettt|tttttL", "PP2, K,V cross": "Ettttt|tttL", "PP2 VP2": "Ett|tt|tt|ttL"}
LOSS, GRAD = 1e-3, 2e-2


@pytest.fixture(scope="module")
def one_gpu() -> Cases:
    models = MODELS | {SAME_IN_BF16: MODEL | FP8}
    return Cases(1, {name: (partial(pipeline_step, model, None, True), {}) for name, model in models.items()})


@pytest.fixture(scope="module")
def two_gpus() -> Cases:
    cases = {}
    for mesh, layout in LAYOUTS.items():
        vp = (layout.count("|") + 1) // 2
        for name, model in MODELS.items():
            step = partial(pipeline_step, model, layout, True)
            cases[mesh, name] = step, dict(pp=2, vp=vp if vp > 1 else None)
    return Cases(2, cases)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mesh", LAYOUTS)
def test_nccl_pipeline_equals_one_gpu(mesh: str, name: str, one_gpu: Cases, two_gpus: Cases) -> None:
    (reference,), results = one_gpu[name], two_gpus[mesh, name]
    merged = results[0] | results[1]
    assert merged.keys() == reference.keys()
    limits = dict.fromkeys(reference, GRAD) | {"loss": LOSS}
    if name in RECIPES:
        (bf16,) = one_gpu[SAME_IN_BF16]
        limits |= {key: max(GRAD, relative_error(reference[key], bf16[key])) for key in limits if key != "loss"}
    errors = {key: relative_error(value, reference[key]) for key, value in merged.items()}
    worst = max(errors, key=lambda key: errors[key] / limits[key])
    print(f"{mesh} {name}: loss {errors['loss']:.1e}, {worst} {errors[worst]:.1e} of {limits[worst]:.1e}")
    assert errors[worst] < limits[worst], worst
