"""Queries that travel between two GPUs give the loss and the gradients of one GPU, in bf16 against float32.

A few percent of roundings, as in test_context_parallel.py. 4096 tokens in chunks of 1024: a suffix in one chunk, and
one across a border.
"""

from functools import partial
from itertools import product

import pytest
import torch
from support import models, pipeline
from support.models import BF16, FULL_RECOMPUTE, STORED_ATTENTION, TE, WIDE_HEADS, assert_close, plain_name
from support.worlds import Cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("context parallel"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LENGTH, SUFFIXES, LOSS, GRAD = 4096, (512, 1536), 5e-3, 6e-2
RECOMPUTE = {"plain": {}, "recompute full": FULL_RECOMPUTE, "recompute all but attention": STORED_ATTENTION}
WAYS = ("keys", "queries")


def step(suffix: int, overrides: dict) -> dict[str, torch.Tensor]:
    """A loss on the last tokens, where alone the cross-decoder is computed."""
    models.SEQ = pipeline.SEQ = LENGTH  # in a process of its own
    mask = torch.zeros(pipeline.MICRO_BATCH, LENGTH)
    mask[:, -suffix:] = 1
    model = WIDE_HEADS | dict(self_decoder="gated_retention", num_layers=4) | overrides
    found = pipeline.pipeline_step(model, None, False, 1, False, False, mask, only_queries=True)
    return {plain_name(name): value for name, value in found.items()}


@pytest.fixture(scope="module")
def one_gpu() -> Cases:
    return Cases(1, {suffix: (partial(step, suffix, {}), {}) for suffix in SUFFIXES})


@pytest.fixture(scope="module")
def two_gpus() -> Cases:
    cases = product(SUFFIXES, RECOMPUTE, WAYS)
    return Cases(
        2,
        {
            case: (
                partial(step, case[0], BF16 | TE | RECOMPUTE[case[1]] | dict(cp_cross_attention=case[2])),
                dict(cp=2),
            )
            for case in cases
        },
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_gpus_equal_one(suffix: int, recompute: str, way: str, one_gpu: Cases, two_gpus: Cases) -> None:
    (reference,) = one_gpu[suffix]
    for result in two_gpus[suffix, recompute, way]:
        assert_close(result, reference, LOSS, GRAD)
