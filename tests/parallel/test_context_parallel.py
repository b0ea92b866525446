"""Context parallelism equals one process: the loss of every micro-batch and the gradient of every parameter.

Sequences of 48 tokens are 4 chunks of 12 over two ranks and 8 of 6 over four; windows are shorter and longer than a
chunk, documents end on, before and after chunks' edges. Tolerances, relative to each tensor's norm: 1e-10 in float64;
2e-5 in float32, where sums run in another order, as in test_parity.py.
"""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from support.models import FULL_RECOMPUTE, SELF_DECODERS, STORED_ATTENTION, relative_error, tiny_config
from support.pipeline import pipeline_step
from support.worlds import run_world

from yoco_megatron.model.cross_decoder.zigzag_attention import is_supported
from yoco_megatron.ops.attention import partial

FLOAT64 = dict(params_dtype=torch.float64, pipeline_dtype=torch.float64)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm"])
SP = dict(sequence_parallel=True)
QK_NORM = dict(qk_layernorm=True, add_qkv_bias=True)
SOURCES = dict(shared_kv_sources=(2, 3))
PP1 = "EttttttttL"

# name -> (layout of 8 layers, cross-decoder from layer 4 on, pipeline ranks, tensor parallel, context parallel, config)
QUICK = {
    "CP2": (PP1, 1, 1, 2, {}),
    "CP4": (PP1, 1, 1, 4, {}),
    "TP2 CP2 SP": (PP1, 1, 2, 2, SP),
    "PP2 CP2 uneven": ("Ett|ttttttL", 2, 1, 2, {}),
    "CP2 recompute full": (PP1, 1, 1, 2, FULL_RECOMPUTE),
    "CP2 recompute all but attention": (PP1, 1, 1, 2, STORED_ATTENTION),
    "PP2 CP2 two sets of K,V": ("Ettttt|tttL", 2, 1, 2, dict(shared_kv_sets=2)),
    "PP2 CP2 K,V of two sources": ("Ett|ttttttL", 2, 1, 2, SOURCES),
}
FULL = {
    "TP2 CP2": (PP1, 1, 2, 2, {}),
    "PP2 CP2 late split": ("Etttttt|ttL", 2, 1, 2, {}),
    "PP2 CP2 VP2 recompute full": ("Ett|tt|tt|ttL", 2, 1, 2, FULL_RECOMPUTE),
    "PP2 CP2 VP2 recompute all but attention": ("Ett|tt|tt|ttL", 2, 1, 2, STORED_ATTENTION),
    "CP4 recompute selective": (PP1, 1, 1, 4, SELECTIVE),
    "TP2 CP2 SP QK-norm and biases": (PP1, 1, 2, 2, SP | QK_NORM),
}
MTP = dict(mtp_num_layers=1)
PREDICTS_MORE = {
    ("CP2 multi-token prediction", "gated_retention"): ("EttttttttmL", 1, 1, 2, MTP),
    ("TP2 PP2 CP2 SP multi-token prediction, recompute full", "sliding_window"): (
        "Ett|ttttttmL", 2, 2, 2, SP | MTP | FULL_RECOMPUTE,
    ),
}  # fmt: skip
WINDOWS = {"short": 5, "long": 17, "longest": 100}


@pytest.fixture(scope="module")
def one_process():
    """The reference for each model, computed once."""
    done: dict = {}

    def step(model: dict, documents: bool) -> dict:
        key = (*sorted((name, str(value)) for name, value in model.items()), documents)
        if key not in done:
            done[key] = run_world(1, pipeline_step, model, None, False, 2, False, documents)[0]
        return done[key]

    return step


def compare(results: list[dict], reference: dict, tolerance: float) -> None:
    """Every rank's loss and gradients; together they hold all parameters."""
    assert set().union(*results) == reference.keys()
    for result in results:
        for name, value in result.items():
            error = relative_error(value, reference[name])
            assert error < tolerance, f"{name}: relative error {error:.1e} against one process"


def check(mesh: str, model: dict, documents: bool, one_process) -> None:
    layout, pp, tp, cp, overrides = (QUICK | FULL | {name: line for (name, _), line in PREDICTS_MORE.items()})[mesh]
    vp = (layout.count("|") + 1) // pp
    results = run_world(
        tp * pp * cp,
        pipeline_step,
        model | overrides,
        layout,
        False,
        2,
        False,
        documents,
        tp=tp,
        pp=pp,
        cp=cp,
        vp=vp if vp > 1 else None,
    )
    model = model | {
        name: value for name, value in overrides.items() if name in ("shared_kv_sets", *SOURCES, *QK_NORM, *MTP)
    }
    compare(results, one_process(model, documents), TOLERANCE[model.get("params_dtype", torch.float32)])


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("mesh", QUICK)
def test_retention(mesh: str, documents: bool, one_process) -> None:
    check(mesh, FLOAT64 | dict(self_decoder="gated_retention"), documents, one_process)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("mesh", "window"), [*zip(QUICK, ["short", "long", "short", "long", "longest", "short", "long", "short"])]
)
def test_windows(mesh: str, window: str, documents: bool, one_process) -> None:
    model = FLOAT64 | dict(self_decoder="sliding_window", self_decoder_window=WINDOWS[window])
    check(mesh, model, documents, one_process)


@pytest.mark.parametrize(
    ("mesh", "kind", "documents"),
    [
        ("TP2 CP2 SP", "SRRS", True),
        ("CP2 recompute full", "SRRS", True),
        ("TP2 CP2 SP", "gated_delta_net", True),
        ("CP2", "gated_delta_net", False),
        ("CP4", "gated_delta_net", True),
        ("PP2 CP2 uneven", "SGRG", True),
        ("CP4 recompute selective", "gated_delta_net", False),
        ("CP4", "mamba2", True),
        ("TP2 CP2 SP", "mamba2", False),
        ("PP2 CP2 uneven", "SMRM", True),
    ],
)
def test_other_mixers(mesh: str, kind: str, documents: bool, one_process) -> None:
    check(mesh, FLOAT64 | dict(self_decoder=kind), documents, one_process)


@pytest.mark.parametrize(
    ("mesh", "kind", "documents"),
    [("TP2 CP2 SP", "SMSS", True), ("PP2 CP2 uneven", "RSGS", True)],
)
def test_memory_units(mesh: str, kind: str, documents: bool, one_process) -> None:
    check(mesh, FLOAT64 | dict(self_decoder=kind, cross_decoder_pattern="GAGA"), documents, one_process)


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_float32(kind: str, one_process) -> None:
    check("CP2", dict(self_decoder=kind), True, one_process)


@pytest.mark.parametrize(("mesh", "kind"), PREDICTS_MORE)
def test_multi_token_prediction(mesh: str, kind: str, one_process) -> None:
    check(mesh, dict(self_decoder=kind), True, one_process)


def test_a_call_for_each_chunk(one_process) -> None:
    """The cross-decoder where zig-zag attention is not supported."""
    kernel = dict(attention_backend=AttnBackend.unfused)
    check("CP2", FLOAT64 | dict(self_decoder="gated_retention") | kernel, False, one_process)


def attention_calls() -> list[tuple[int, int, bool]]:
    """(queries, keys, masked) of each call of the first cross-decoder layer, in chunks of 6 tokens."""
    calls = []
    forward = partial.forward

    def counted(q, k, v, causal, scale):
        calls.append((q.shape[2] // 6, k.shape[2] // 6, causal))
        return forward(q, k, v, causal, scale)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(partial, "forward", counted)
        pipeline_step(dict(self_decoder="gated_retention"), None, False, 1)
    assert calls == calls[: len(calls) // 4] * 4  # layers are alike
    return calls[: len(calls) // 4]


def test_the_cross_decoder_masks_only_squares() -> None:
    own = (2, 2, True)
    assert run_world(4, attention_calls, cp=4) == [
        [own, (1, 6, False)],
        [own, (2, 1, False), (1, 4, False)],
        [own, (2, 2, False), (1, 2, False)],
        [own, (2, 3, False)],
    ]


@pytest.mark.parametrize(
    ("options", "supported"),
    [
        ({}, True),
        (dict(attention_backend=AttnBackend.fused), True),
        (dict(attention_backend=AttnBackend.unfused), False),
        (dict(attention_dropout=0.1), False),
        (dict(deterministic_mode=True), False),
        (dict(fp8_dot_product_attention=True), False),
    ],
)
def test_what_only_transformer_engine_can_do_stays_there(options: dict, supported: bool) -> None:
    """Zig-zag attention has no dropout, no FP8, no other kernel."""
    shard = SimpleNamespace(ranks=2, document_ids=None, chunk_length=6)
    assert is_supported(tiny_config(**options), torch.zeros(12, 1, 4, 8), shard) == supported


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, "short", "long"])
@pytest.mark.parametrize("mesh", QUICK | FULL)
def test_whole_matrix(mesh: str, window: str | None, one_process) -> None:
    """Every mesh, both self-decoders, on packed documents, of which one fills its sequence."""
    model = FLOAT64 | dict(self_decoder=SELF_DECODERS[0])
    if window:
        model = FLOAT64 | dict(self_decoder="sliding_window", self_decoder_window=WINDOWS[window])
    check(mesh, model, True, one_process)
