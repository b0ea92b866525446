"""A pipeline equals one process: the loss of every micro-batch and the gradient of every parameter, at any cuts.

Tolerance: fp32. Without tensor parallelism stages compute what one process computes, but gradients of the K,V may be
summed in another order, so 2e-6 of each tensor's norm; tensor parallelism sums everything in another order, as in
test_parity.py, 2e-5.
"""

import pytest
import torch
from support.models import FULL_RECOMPUTE, SELF_DECODERS, relative_error
from support.pipeline import pipeline_step
from support.worlds import run_world

LOSS, GRAD, GRAD_TP = 1e-6, 2e-6, 2e-5
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm"])

# name -> (layout of 8 layers, cross-decoder from layer 4 on, ranks, tensor parallel, config)
QUICK = {
    "PP2": ("Etttt|ttttL", 2, 1, {}),
    "PP2 split inside a stage": ("Ett|ttttttL", 2, 1, {}),
    "PP2 late split, K,V sent from the last self layer's stage": ("Etttttt|ttL", 2, 1, {}),
    "PP4": ("Ett|tt|tt|ttL", 4, 1, {}),
    "PP2 VP2": ("Ett|tt|tt|ttL", 2, 1, {}),
    "TP2 PP2 SP": ("Etttt|ttttL", 2, 2, dict(sequence_parallel=True)),
    "PP2 recompute full": ("Ettt|tttttL", 2, 1, FULL_RECOMPUTE),
    "PP2 multi-token prediction": ("Etttt|ttttmL", 2, 1, dict(mtp_num_layers=1)),
    "PP4 two sets of K,V, one of which passes a stage": ("Etttt|t|tt|tL", 4, 1, dict(shared_kv_sets=2)),
    "PP4 K,V of two sources, of which one passes a self-decoder stage": (
        "Ett|tt|tt|ttL",
        4,
        1,
        dict(shared_kv_sources=(1, 4)),
    ),
    "PP4 gated memory units, memory sent from within the self-decoder": (
        "Et|tt|tttt|tL",
        4,
        1,
        dict(self_decoder="RSS", num_self_decoder_layers=3, cross_decoder_pattern="GAAGA"),
    ),
    "PP2 VP2 gated memory units, neither K,V nor memory to the end, recompute full": (
        "Ett|ttt|tt|tL",
        2,
        1,
        dict(
            self_decoder="SMS",
            num_self_decoder_layers=3,
            cross_decoder_pattern="GAAGG",
            **FULL_RECOMPUTE,
        ),
    ),
    "TP2 PP2 SP gated memory units, two sets of K,V": (
        "Etttt|ttttL",
        2,
        2,
        dict(
            sequence_parallel=True,
            self_decoder="gated_delta_net",
            num_self_decoder_layers=4,
            shared_kv_sets=2,
            cross_decoder_pattern="GAAG",
        ),
    ),
    "PP4 a mixer for each layer": ("Ett|tt|tt|ttL", 4, 1, dict(self_decoder="SMRG")),
}
# What changes the model, not only how it is computed.
OF_THE_MODEL = (
    "self_decoder",
    "num_self_decoder_layers",
    "cross_decoder_pattern",
    "shared_kv_sets",
    "shared_kv_sources",
    "qk_layernorm",
    "add_qkv_bias",
    "mtp_num_layers",
)
FULL = {
    "PP4 uneven": ("Et|ttttt|t|tL", 4, 1, {}),
    "PP4 embedding and head alone": ("E|ttttt|ttt|L", 4, 1, {}),
    "PP4 VP2": ("Et|t|t|t|t|t|t|tL", 4, 1, {}),
    "PP2 VP4": ("Et|t|t|t|t|t|t|tL", 2, 1, {}),
    "PP2 VP2 uneven": ("Ettt|t|ttt|tL", 2, 1, {}),
    "TP2 PP2": ("Etttt|ttttL", 2, 2, {}),
    "TP2 PP2 SP VP2": ("Ett|tt|tt|ttL", 2, 2, dict(sequence_parallel=True)),
    "TP2 PP2 SP recompute full": ("Ettt|tttttL", 2, 2, dict(sequence_parallel=True, **FULL_RECOMPUTE)),
    "PP2 recompute selective": ("Ettt|tttttL", 2, 1, SELECTIVE),
    "PP4 VP2 recompute full": ("Et|t|t|t|t|t|t|tL", 4, 1, FULL_RECOMPUTE),
    "PP2 no self-decoder": ("Etttt|ttttL", 2, 1, dict(num_self_decoder_layers=0)),
    "PP4 split 3:1": ("Ett|tt|tt|ttL", 4, 1, dict(num_self_decoder_layers=6)),
    "PP2 VP4 a set of K,V for each layer": ("Et|t|t|t|t|t|t|tL", 2, 1, dict(shared_kv_sets=4)),
    "PP2 VP4 K,V of each layer": ("Et|t|t|t|t|t|t|tL", 2, 1, dict(shared_kv_sources=(1, 2, 3, 4))),
    "TP2 PP2 SP K,V of two earlier layers, recompute full": (
        "Ettt|tttttL",
        2,
        2,
        dict(sequence_parallel=True, shared_kv_sources=(2, 3), shared_kv_sets=4, **FULL_RECOMPUTE),
    ),
    "TP2 PP2 SP two sets of K,V": ("Ett|ttttttL", 2, 2, dict(sequence_parallel=True, shared_kv_sets=2)),
    "TP2 PP2 SP VP2 two layers of multi-token prediction, alone with the head": (
        "Ett|tt|tttt|mmL",
        2,
        2,
        dict(sequence_parallel=True, mtp_num_layers=2),
    ),
    "PP4 two sets of K,V, QK-norm and biases": (
        "Etttt|t|tt|tL",
        4,
        1,
        dict(shared_kv_sets=2, qk_layernorm=True, add_qkv_bias=True),
    ),
}
DOCUMENTS = {
    "PP4": ("Ett|tt|tt|ttL", 4, 1, {}),
    "PP2 VP2 recompute full": ("Ett|tt|tt|ttL", 2, 1, FULL_RECOMPUTE),
    "TP2 SP": ("EttttttttL", 1, 2, dict(sequence_parallel=True)),
    "TP2 PP2 SP recompute selective": ("Ettt|tttttL", 2, 2, dict(sequence_parallel=True, **SELECTIVE)),
}
# One case that differs from the common one in nothing but the number of micro-batches.
MICROBATCHES = {"PP2 VP2": 6, "PP4 VP2": 8, "PP2": 3}


@pytest.fixture(scope="module")
def one_process():
    """The reference for each model, computed once."""
    done: dict = {}

    def step(overrides: dict, tied: bool, num_microbatches: int, forward_only: bool = False, documents=False) -> dict:
        key = (tuple(sorted(overrides.items())), tied, num_microbatches, forward_only, documents)
        if key not in done:
            done[key] = run_world(1, pipeline_step, overrides, None, *key[1:])[0]
        return done[key]

    return step


def whole_model(results: list[dict]) -> dict[str, torch.Tensor]:
    """What the ranks returned, merged; parameters that two ranks hold (a tied embedding) must agree."""
    merged: dict[str, torch.Tensor] = {}
    for result in results:
        for name, value in result.items():
            assert name not in merged or relative_error(value, merged[name]) < 1e-6, f"ranks disagree on {name}"
            merged[name] = value
    return merged


def compare(result: dict, reference: dict, grad: float) -> None:
    assert result.keys() == reference.keys()
    for name, value in result.items():
        error = relative_error(value, reference[name])
        assert error < (LOSS if name == "loss" else grad), f"{name}: relative error {error:.1e} against one process"


def check(mesh: str, kind: str, tied: bool, one_process) -> None:
    layout, ranks, tp, overrides = (QUICK | FULL)[mesh]
    vp = (layout.count("|") + 1) // ranks
    number = MICROBATCHES.get(mesh, 4)
    model = {"self_decoder": kind, **overrides}
    plain = {name: value for name, value in model.items() if name in OF_THE_MODEL}
    results = run_world(
        ranks * tp, pipeline_step, model, layout, tied, number, tp=tp, pp=ranks, vp=vp if vp > 1 else None
    )
    compare(whole_model(results), one_process(plain, tied, number), GRAD if tp == 1 else GRAD_TP)


@pytest.mark.parametrize("mesh", QUICK)
def test_pipeline_equals_one_process(mesh: str, one_process) -> None:
    """Each cut with one self-decoder and one kind of head; the slow test below has all."""
    index = list(QUICK).index(mesh)
    check(mesh, SELF_DECODERS[index % len(SELF_DECODERS)], tied=index % 3 != 1, one_process=one_process)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SELF_DECODERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("mesh", QUICK | FULL)
def test_whole_matrix(mesh: str, kind: str, tied: bool, one_process) -> None:
    check(mesh, kind, tied, one_process)


@pytest.mark.parametrize(
    ("layout", "ranks"), [("Ett|ttttttL", 2), ("Ett|tt|tt|ttL", 2), ("Et|ttttt|t|tL", 4)], ids=["PP2", "PP2 VP2", "PP4"]
)
def test_evaluation(layout: str, ranks: int, one_process) -> None:
    vp = (layout.count("|") + 1) // ranks
    results = run_world(ranks, pipeline_step, {}, layout, False, 4, True, pp=ranks, vp=vp if vp > 1 else None)
    compare(whole_model(results), one_process({}, False, 4, True), GRAD)


@pytest.mark.parametrize(("mesh", "kind"), zip(DOCUMENTS, SELF_DECODERS * 2))
def test_packed_documents(mesh: str, kind: str, one_process) -> None:
    """Every stage and every tensor-parallel rank keeps documents apart."""
    layout, ranks, tp, overrides = DOCUMENTS[mesh]
    vp = (layout.count("|") + 1) // ranks
    results = run_world(
        ranks * tp,
        pipeline_step,
        dict(self_decoder=kind, **overrides),
        layout,
        False,
        4,
        False,
        True,
        tp=tp,
        pp=ranks,
        vp=vp if vp > 1 else None,
    )
    reference = one_process(dict(self_decoder=kind), False, 4, False, True)
    compare(whole_model(results), reference, GRAD if tp == 1 else GRAD_TP)
    with pytest.raises(AssertionError, match="relative error"):
        compare(reference, one_process(dict(self_decoder=kind), False, 4), GRAD)


@pytest.mark.parametrize(
    ("layout", "model"),
    [("Ett|tt|tt|ttL", {}), ("Et|tt|tttt|tL", dict(num_self_decoder_layers=0, shared_kv_sets=2))],
    ids=["one set", "two sets, one of which passes a stage"],
)
def test_bf16_transport(layout: str, model: dict) -> None:
    """In bf16, sending K,V and their gradients in fp32 is exact: the same gradients as bf16 in one process, but for the
    rounding of hidden states' own path; sending bf16 rounds dK,dV once a boundary (2^-9 each)."""
    bf16 = dict(bf16=True, params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, **model)
    reference = run_world(1, pipeline_step, bf16, None, False)[0]
    errors = {}
    for fp32 in (True, False):
        results = run_world(4, pipeline_step, bf16 | {"fp32_kv_transport": fp32}, layout, False, pp=4)
        name = "grad/decoder.shared_kv.linear_kv.weight"
        errors[fp32] = relative_error(whole_model(results)[name], reference[name])
    print(f"relative error of the K,V weight's gradient over 2 boundaries: {errors}")
    assert errors[True] < 1e-6
    assert 1e-6 < errors[False] < 4e-3


def test_the_comparison_can_fail(one_process) -> None:
    other = whole_model(
        run_world(
            2, pipeline_step, {"self_decoder_window": 6, "self_decoder": "sliding_window"}, "Etttt|ttttL", False, pp=2
        )
    )
    with pytest.raises(AssertionError, match="relative error"):
        compare(other, one_process({"self_decoder": "sliding_window"}, False, 4), GRAD)
