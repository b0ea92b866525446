"""On one GPU, a cross-decoder at positions with loss alone: Transformer Engine's kernels against float32 torch at all
positions, in bf16 and FP8, and against themselves at all positions.

Tolerances as in test_transformer_engine.py; kernels see other numbers of rows, so that sums run in another order.
"""

import pytest
import torch
from support.models import (
    BF16,
    FULL_RECOMPUTE,
    SELF_DECODERS,
    SEQ,
    STORED_ATTENTION,
    TE,
    WIDE_HEADS,
    plain_name,
    relative_error,
)
from support.pipeline import MICRO_BATCH, pipeline_step

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_process")]
LOSS, GRAD, SAME_KERNELS = 5e-3, 6e-2, 2e-2
FP8 = dict(fp8="hybrid", fp8_recipe="delayed")
RECOMPUTE = {"plain": {}, "recompute full": FULL_RECOMPUTE, "recompute all but attention": STORED_ATTENTION}


def mask(name: str) -> torch.Tensor:
    """[sequences of two micro-batches, SEQ]."""
    found = torch.zeros(2 * MICRO_BATCH, SEQ)
    if name == "suffix":
        found[:, -9:] = 1
    else:
        for sample, row in enumerate(found):
            row[4 + sample : 11 + sample] = row[25:31] = 1
    return found


def step(model: dict, where: str, documents: bool, only_queries: bool) -> dict[str, torch.Tensor]:
    found = pipeline_step(model, None, False, 2, False, documents, mask(where), only_queries)
    return {plain_name(name): value for name, value in found.items()}


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("where", ["suffix", "answers"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_bf16(kind: str, recompute: str, where: str, documents: bool) -> None:
    model = dict(self_decoder=kind, num_layers=4, **WIDE_HEADS)
    reference = step(model, where, documents, only_queries=False)
    everywhere = step(model | BF16 | TE | RECOMPUTE[recompute], where, documents, only_queries=False)
    result = step(model | BF16 | TE | RECOMPUTE[recompute], where, documents, only_queries=True)
    assert result.keys() == reference.keys()
    for name, value in result.items():
        error, to_itself = relative_error(value, reference[name]), relative_error(value, everywhere[name])
        assert error < (LOSS if name == "loss" else GRAD), f"{name}: {error:.1e}"
        assert to_itself < SAME_KERNELS, f"{name}: {to_itself:.1e} from all positions"


@pytest.mark.parametrize("where", ["suffix", "answers"])
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_fp8(kind: str, where: str) -> None:
    """Scales are those of fewer rows: less than twice what FP8 itself adds to bf16's gradients."""
    model = BF16 | TE | dict(self_decoder=kind, num_layers=4, ffn_hidden_size=384, **WIDE_HEADS)
    bf16 = step(model, where, False, only_queries=False)
    everywhere = step(model | FP8, where, False, only_queries=False)
    result = step(model | FP8, where, False, only_queries=True)
    for name, value in result.items():
        error, of_fp8 = relative_error(value, everywhere[name]), relative_error(everywhere[name], bf16[name])
        assert error < (LOSS if name == "loss" else max(2 * of_fp8, SAME_KERNELS)), f"{name}: {error:.1e}"
