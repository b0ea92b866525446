"""Pipelines over NCCL with Transformer Engine in bf16 give the losses and gradients of one GPU.

Tolerance: the same layers run on the same values, but dK,dV are rounded to bf16 at a boundary (2^-9).
"""

import pytest
import torch
from support.models import SELF_DECODERS, relative_error
from support.pipeline import pipeline_step
from support.worlds import run_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
MODEL = dict(
    transformer_impl="transformer_engine",
    apply_rope_fusion=True,
    bf16=True,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
)
LOSS, GRAD = 1e-3, 2e-2


@pytest.mark.parametrize("kind", SELF_DECODERS)
@pytest.mark.parametrize("layout", ["Ettt|tttttL", "Ett|tt|tt|ttL"], ids=["PP2", "PP2 VP2"])
def test_nccl_pipeline_equals_one_gpu(layout: str, kind: str) -> None:
    model = MODEL | {"self_decoder": kind}
    reference = run_world(1, pipeline_step, model, None, True)[0]
    vp = (layout.count("|") + 1) // 2
    results = run_world(2, pipeline_step, model, layout, True, pp=2, vp=vp if vp > 1 else None)
    merged = results[0] | results[1]
    assert merged.keys() == reference.keys()
    for name, value in merged.items():
        assert relative_error(value, reference[name]) < (LOSS if name == "loss" else GRAD), name
