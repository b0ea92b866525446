"""Context parallelism over NCCL on two GPUs gives the loss and the gradients of one GPU.

In float32 with torch's layers: 1e-4 of each tensor's norm, for sums in another order and atomics. In bf16 with
Transformer Engine against float32 on one GPU, as in test_transformer_engine.py: a few percent of roundings.
"""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from support.models import BF16, FULL_RECOMPUTE, SELF_DECODERS, TE, WIDE_HEADS, plain_name, relative_error
from support.pipeline import pipeline_step
from support.worlds import Cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("context parallel"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
# Windows shorter and longer than the chunks of 12 tokens.
WINDOWS = {"gated_retention": [7], "sliding_window": [7, 17]}
PATHS = {
    "float32 torch": ({}, 1e-5, 1e-4),
    "bf16 torch": (BF16, 5e-3, 6e-2),
    "bf16 transformer engine": (BF16 | TE, 5e-3, 6e-2),
    "bf16 transformer engine, recompute": (BF16 | TE | FULL_RECOMPUTE, 5e-3, 6e-2),
}
CASES = [(kind, window) for kind in SELF_DECODERS for window in WINDOWS[kind]]
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])


def step(kind: str, window: int, path: str, documents: bool) -> dict:
    model = WIDE_HEADS | dict(self_decoder=kind, self_decoder_window=window) | PATHS[path][0]
    return pipeline_step(model, None, False, 2, False, documents)


def long_step(kind: str, documents: bool) -> dict:
    """4096 tokens a sequence: chunks of 1024, larger than any kernel's tile, with a window of 512."""
    from support import models, pipeline

    was = models.SEQ, models.BORDERS
    models.SEQ = pipeline.SEQ = 4096
    models.BORDERS = ([1024, 3072], [1023, 1025, 2500])
    try:
        model = WIDE_HEADS | PATHS["bf16 transformer engine"][0]
        model |= dict(self_decoder=kind, self_decoder_window=512, num_layers=4)
        return pipeline_step(model, None, False, 1, False, documents)
    finally:
        models.SEQ, models.BORDERS = was
        pipeline.SEQ = models.SEQ


def steps(paths: Iterable[str]) -> dict[tuple, Callable[[], dict]]:
    """Each test's step, and the long ones, by what the tests call them."""
    cases = [(*case, path, documents) for case in CASES for path in paths for documents in (False, True)]
    long_cases = [(kind, documents) for kind in SELF_DECODERS for documents in (False, True)]
    return {case: partial(step, *case) for case in cases} | {case: partial(long_step, *case) for case in long_cases}


@pytest.fixture(scope="module")
def one_gpu() -> Cases:
    """Float32 with torch, and long sequences as they are."""
    return Cases(1, {case: (call, {}) for case, call in steps(["float32 torch"]).items()})


@pytest.fixture(scope="module")
def two_gpus() -> Cases:
    return Cases(2, {case: (call, dict(cp=2)) for case, call in steps(PATHS).items()})


@DOCUMENTS
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "window"), CASES)
def test_two_gpus_equal_one(
    kind: str, window: int, path: str, documents: bool, one_gpu: Cases, two_gpus: Cases
) -> None:
    _, loss, grad = PATHS[path]
    (reference,) = one_gpu[kind, window, "float32 torch", documents]
    for result in two_gpus[kind, window, path, documents]:
        assert_close({plain_name(name): value for name, value in result.items()}, reference, loss, grad)


@DOCUMENTS
@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_long_sequences(kind: str, documents: bool, one_gpu: Cases, two_gpus: Cases) -> None:
    """Both in bf16, so that twice its noise is allowed."""
    (reference,) = one_gpu[kind, documents]
    for result in two_gpus[kind, documents]:
        assert_close(result, reference, 5e-3, 6e-2)


def assert_close(result: dict, reference: dict, loss: float, grad: float) -> None:
    assert result.keys() == reference.keys()
    errors = {name: relative_error(value, reference[name]) for name, value in result.items()}
    of_loss = errors.pop("loss")
    worst = max(errors, key=errors.get)
    print(f"loss {of_loss:.1e}, worst gradient {worst} {errors[worst]:.1e}")
    assert of_loss < loss
    assert errors[worst] < grad, worst
