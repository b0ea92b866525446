"""Context parallelism over NCCL on two GPUs gives the loss and the gradients of one GPU.

Sequences of 48 tokens are too short for the cross-decoder's calls without a masked rectangle; those of 4096 use them.
In float32 with torch's layers: 1e-4 of each tensor's norm, for sums in another order and atomics. In bf16 with
Transformer Engine against float32 on one GPU, as in test_transformer_engine.py: a few percent of roundings. In FP8,
where each GPU may round by scales of its own tensors, against FP8 on one GPU: twice what FP8 adds to bf16's gradients.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

import pytest
import torch
from megatron.core import parallel_state as mpu
from support.models import (
    BF16,
    FULL_RECOMPUTE,
    SELF_DECODERS,
    STORED_ATTENTION,
    TE,
    WIDE_HEADS,
    assert_close,
    plain_name,
    relative_error,
)
from support.pipeline import pipeline_step
from support.worlds import Cases

from yoco_megatron.ops.attention import partial as attention_of_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("context parallel"),
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
# (window, sets of K,V); windows shorter and longer than the chunks of 12 tokens.
WINDOWS = {"gated_retention": [(7, 1)], "sliding_window": [(7, 1), (17, 2)]}
PATHS = {
    "float32 torch": ({}, 1e-5, 1e-4),
    "bf16 torch": (BF16, 5e-3, 6e-2),
    "bf16 transformer engine": (BF16 | TE, 5e-3, 6e-2),
    "bf16 transformer engine, recompute": (BF16 | TE | FULL_RECOMPUTE, 5e-3, 6e-2),
    "bf16 transformer engine, recompute all but attention": (BF16 | TE | STORED_ATTENTION, 5e-3, 6e-2),
}
LONG = {"plain": {}, "all but attention": STORED_ATTENTION}
FP8_RECIPES = ("delayed", "tensorwise")
CASES = [(kind, *case) for kind in SELF_DECODERS for case in WINDOWS.get(kind, [(7, 1)])]
DOCUMENTS = pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])


def step(kind: str, window: int, kv_sets: int, path: str, documents: bool) -> dict:
    model = WIDE_HEADS | dict(self_decoder=kind, self_decoder_window=window, shared_kv_sets=kv_sets) | PATHS[path][0]
    return pipeline_step(model, None, False, 2, False, documents)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Gets the arguments of each call of attention over a part of the keys."""
    calls, forward = [], attention_of_parts.forward
    monkeypatch.setattr(attention_of_parts, "forward", lambda *args: (calls.append(args), forward(*args))[1])
    return calls


def long_step(kind: str, documents: bool, recompute: str) -> dict:
    """4096 tokens a sequence: chunks of 1024, larger than any kernel's tile, with a window of 512."""
    from support import models, pipeline

    was = models.SEQ, models.DOCUMENT_STARTS
    models.SEQ = pipeline.SEQ = 4096
    models.DOCUMENT_STARTS = ([1024, 3072], [1023, 1025, 2500])
    try:
        model = WIDE_HEADS | PATHS["bf16 transformer engine"][0]
        model |= dict(self_decoder=kind, self_decoder_window=512, num_layers=4) | LONG[recompute]
        with pytest.MonkeyPatch.context() as monkeypatch:
            calls = count_calls(monkeypatch)
            result = pipeline_step(model, None, False, 1, False, documents)
        zigzag = mpu.get_context_parallel_world_size() > 1 and not documents
        assert len(calls) == (4 if zigzag else 0), "two calls in each of two cross-decoder layers"
        return result
    finally:
        models.SEQ, models.DOCUMENT_STARTS = was
        pipeline.SEQ = models.SEQ


def fp8_step(recipe: str | None) -> dict:
    """Two micro-batches; in bf16 without a recipe."""
    model = WIDE_HEADS | BF16 | TE | dict(self_decoder="gated_retention", ffn_hidden_size=384)
    model |= dict(fp8="hybrid", fp8_recipe=recipe) if recipe else {}
    return pipeline_step(model, None, False, 2)


def steps(paths: Iterable[str]) -> dict[tuple, Callable[[], dict]]:
    """Each test's step, and the long ones, by what the tests call them."""
    cases = [(*case, path, documents) for case in CASES for path in paths for documents in (False, True)]
    fp8_cases = [("fp8", recipe) for recipe in (*FP8_RECIPES, None)]
    return (
        {case: partial(step, *case) for case in cases}
        | {case: partial(long_step, *case) for case in product(SELF_DECODERS, (False, True), LONG)}
        | {case: partial(fp8_step, case[1]) for case in fp8_cases}
    )


@pytest.fixture(scope="module")
def one_gpu() -> Cases:
    """Float32 with torch, and long sequences as they are."""
    return Cases(1, {case: (call, {}) for case, call in steps(["float32 torch"]).items()})


@pytest.fixture(scope="module")
def two_gpus() -> Cases:
    return Cases(2, {case: (call, dict(cp=2)) for case, call in steps(PATHS).items()})


@DOCUMENTS
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "window", "kv_sets"), CASES)
def test_two_gpus_equal_one(
    kind: str, window: int, kv_sets: int, path: str, documents: bool, one_gpu: Cases, two_gpus: Cases
) -> None:
    _, loss, grad = PATHS[path]
    (reference,) = one_gpu[kind, window, kv_sets, "float32 torch", documents]
    for result in two_gpus[kind, window, kv_sets, path, documents]:
        assert_close({plain_name(name): value for name, value in result.items()}, reference, loss, grad)


@DOCUMENTS
@pytest.mark.parametrize("kind", SELF_DECODERS)
@pytest.mark.parametrize("recompute", LONG)
def test_long_sequences(kind: str, documents: bool, recompute: str, one_gpu: Cases, two_gpus: Cases) -> None:
    """Both in bf16, so that twice its noise is allowed."""
    (reference,) = one_gpu[kind, documents, "plain"]
    for result in two_gpus[kind, documents, recompute]:
        assert_close(result, reference, 5e-3, 6e-2)


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_fp8(recipe: str, one_gpu: Cases, two_gpus: Cases) -> None:
    (reference,), (bf16,) = one_gpu["fp8", recipe], one_gpu["fp8", None]
    for result in two_gpus["fp8", recipe]:
        assert result.keys() == reference.keys()
        for name, value in result.items():
            limit = 5e-3 if name == "loss" else max(2e-2, 2 * relative_error(reference[name], bf16[name]))
            error = relative_error(value, reference[name])
            assert error < limit, f"{name}: {error:.1e}, at most {limit:.1e}"
