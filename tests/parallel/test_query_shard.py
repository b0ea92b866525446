"""A cross-decoder that computes only positions with loss gives the loss and the gradients of the whole computation."""

from argparse import Namespace

import pytest
import torch
from support.models import (
    FULL_RECOMPUTE,
    SEQ,
    STORED_ATTENTION,
    batch,
    build,
    document_batch,
    relative_error,
    tiny_config,
)
from support.pipeline import MICRO_BATCH, pipeline_step
from support.worlds import run_world

from yoco_megatron.parallel.context.query_shard import QueryShard, _route, count, dealt_runs, suffix_run
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.training import query_positions

# Differences are rounding alone: sums in another order.
FLOAT64, TOLERANCE = dict(params_dtype=torch.float64, pipeline_dtype=torch.float64), 1e-12
PP1, MICROBATCHES = "EttttttttL", 2
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn", "layernorm"])
SP = dict(sequence_parallel=True)
KEYS, QUERIES = (dict(cp_cross_attention=what) for what in ("keys", "queries"))
RETENTION, WINDOW = "gated_retention", "sliding_window"

# name -> (layout of 8 layers, pipeline ranks, tensor parallel, context parallel, config)
MESHES = {
    "one process": (PP1, 1, 1, 1, {}),
    "recompute full": (PP1, 1, 1, 1, FULL_RECOMPUTE),
    "recompute all but attention": (PP1, 1, 1, 1, STORED_ATTENTION),
    "recompute selective": (PP1, 1, 1, 1, SELECTIVE),
    "TP2": (PP1, 1, 2, 1, {}),
    "TP2 SP": (PP1, 1, 2, 1, SP),
    "CP2": (PP1, 1, 1, 2, KEYS),
    "CP4": (PP1, 1, 1, 4, KEYS),
    "TP2 CP2 SP": (PP1, 1, 2, 2, SP | KEYS),
    "PP2": ("Ett|ttttttL", 2, 1, 1, {}),
    "PP2 VP2": ("Ett|tt|tt|ttL", 2, 1, 1, {}),
    "TP2 PP2 SP": ("Etttttt|ttL", 2, 2, 1, SP),
    "TP2 PP2 SP early split": ("Ettt|tttttL", 2, 2, 1, SP),
    "PP2 CP2": ("Ettt|tttttL", 2, 1, 2, KEYS),
    "CP2 queries travel": (PP1, 1, 1, 2, QUERIES),
    "CP2 queries travel, recompute full": (PP1, 1, 1, 2, QUERIES | FULL_RECOMPUTE),
    "CP2 queries travel, recompute all but attention": (PP1, 1, 1, 2, QUERIES | STORED_ATTENTION),
    "CP2 queries travel, recompute selective": (PP1, 1, 1, 2, QUERIES | SELECTIVE),
    "CP4 queries travel": (PP1, 1, 1, 4, QUERIES),
    "TP2 CP2 SP queries travel": (PP1, 1, 2, 2, SP | QUERIES),
    "PP2 CP2 queries travel": ("Ettt|tttttL", 2, 1, 2, QUERIES),
}
# (mesh, self-decoder, where there is a loss, packed documents)
CASES = [
    ("one process", RETENTION, "answers", True),
    ("one process", WINDOW, "random", True),
    ("one process", RETENTION, "none", False),
    ("one process", RETENTION, "all", False),
    ("recompute full", RETENTION, "answers", True),
    ("recompute all but attention", WINDOW, "random", True),
    ("recompute selective", RETENTION, "answers", True),
    ("TP2", WINDOW, "random", True),
    ("TP2 SP", RETENTION, "suffix", False),
    ("CP2", WINDOW, "random", True),
    ("CP4", RETENTION, "suffix", False),
    ("TP2 CP2 SP", RETENTION, "answers", True),
    ("PP2", RETENTION, "none", False),
    ("PP2 VP2", RETENTION, "answers", True),
    ("TP2 PP2 SP", WINDOW, "random", True),
    ("PP2 CP2", RETENTION, "suffix", False),
    # Chunks of 12 tokens for two ranks, of 6 for four: the suffix, of 8, lies in one or across a border.
    ("CP2 queries travel", RETENTION, "suffix", False),
    ("CP2 queries travel", RETENTION, "none", False),
    ("CP2 queries travel, recompute full", WINDOW, "random", False),
    ("CP2 queries travel, recompute all but attention", RETENTION, "answers", False),
    ("CP2 queries travel, recompute selective", WINDOW, "random", False),
    ("CP4 queries travel", RETENTION, "suffix", False),
    ("CP4 queries travel", RETENTION, "answers", False),
    ("TP2 CP2 SP queries travel", RETENTION, "answers", False),
    ("PP2 CP2 queries travel", WINDOW, "random", False),
]
# The same with several sets of K,V, for the four layers of the cross-decoder, with K,V of these sources, or with gated
# memory units.
SEVERAL_SETS = [
    (2, "recompute full", RETENTION, "answers", True),
    (2, "TP2 SP", RETENTION, "answers", True),
    (2, "PP2 VP2", RETENTION, "answers", True),
    (2, "CP2", RETENTION, "answers", True),
    (4, "recompute all but attention", WINDOW, "random", False),
    (4, "CP2", WINDOW, "random", False),
    (4, "CP2 queries travel", WINDOW, "random", False),
    (4, "PP2 CP2", WINDOW, "random", False),
    (4, "TP2 PP2 SP", WINDOW, "random", False),
    ((1, 4), "PP2 VP2", RETENTION, "answers", True),
    ((1, 2), "TP2 PP2 SP early split", RETENTION, "answers", True),
    ("AGGA", "PP2 VP2", "RSSS", "answers", True),
    ("GAGA", "TP2 CP2 SP", "SMSS", "answers", True),
    ("GAGA", "recompute all but attention", "SMSS", "suffix", False),
]


def masks() -> dict[str, torch.Tensor]:
    """Float [sequences, SEQ]: where the loss counts, other positions in each micro-batch but for the suffix."""
    sequences = MICRO_BATCH * MICROBATCHES
    found = {name: torch.zeros(sequences, SEQ) for name in ("suffix", "answers", "none", "all", "random")}
    found["suffix"][:, -7:] = 1
    for sample in range(sequences):
        found["answers"][sample, 3 + sample : 9 + sample] = 1
        found["answers"][sample, 30 - 4 * sample : 36 - 4 * sample] = 1
    found["all"][:] = 1
    found["random"].bernoulli_(0.2, generator=torch.Generator().manual_seed(3))
    return found


def step(
    kv_sets: int | tuple[int, ...] | str, mesh: str, kind: str, where: str, documents: bool, only_queries: bool
) -> list[dict]:
    layout, pp, tp, cp, overrides = MESHES[mesh]
    vp = (layout.count("|") + 1) // pp
    field = {int: "shared_kv_sets", tuple: "shared_kv_sources", str: "cross_decoder_pattern"}[type(kv_sets)]
    model = FLOAT64 | {"self_decoder": kind, field: kv_sets} | overrides
    given = model, layout, False, MICROBATCHES, False, documents, masks()[where], only_queries
    return run_world(tp * pp * cp, pipeline_step, *given, tp=tp, pp=pp, cp=cp, vp=vp if vp > 1 else None)


@pytest.fixture(scope="module")
def everywhere():
    """The reference: one process computes all positions and masks the loss."""
    done: dict = {}

    def found(kv_sets: int | tuple[int, ...] | str, *case) -> dict[str, torch.Tensor]:
        if (kv_sets, *case) not in done:
            done[kv_sets, *case] = step(kv_sets, "one process", *case, only_queries=False)[0]
        return done[kv_sets, *case]

    return found


@pytest.mark.parametrize(
    ("kv_sets", "mesh", "kind", "where", "documents"), [*((1, *case) for case in CASES), *SEVERAL_SETS]
)
def test_equals_the_whole_computation(
    kv_sets: int | tuple[int, ...] | str, mesh: str, kind: str, where: str, documents: bool, everywhere
) -> None:
    reference = everywhere(kv_sets, kind, where, documents)
    results = step(kv_sets, mesh, kind, where, documents, only_queries=True)
    assert set().union(*results) == reference.keys()
    for result in results:
        for name, value in result.items():
            if where == "none":
                assert value.abs().max() == 0 == reference[name].abs().max()
            else:
                error = relative_error(value, reference[name])
                assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


@pytest.mark.usefixtures("one_process")
def test_only_the_queries_are_computed() -> None:
    """Rows that each layer and the output layer see, and that a run of other positions is another loss."""
    model = build(tiny_config(**FLOAT64))
    tokens, labels = batch(MICRO_BATCH)
    rows = {}

    def count_rows(name: str):
        return lambda module, inputs, kwargs: rows.__setitem__(name, len(kwargs.get("hidden_states", *inputs[:1])))

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(count_rows(f"layer {layer.layer_number}"), with_kwargs=True)
    model.output_layer.register_forward_pre_hook(count_rows("output"), with_kwargs=True)
    runs = ((5, 9), (40, 44))
    losses = model(tokens, labels=torch.cat([labels[:, 5:9], labels[:, 40:44]], 1), query_runs=runs)
    assert list(rows.values()) == [SEQ, SEQ, 8, 8, 8]
    whole = model(tokens, labels=labels)
    assert torch.allclose(losses, torch.cat([whole[:, 5:9], whole[:, 40:44]], 1), rtol=1e-6)
    shifted = model(tokens, labels=torch.cat([labels[:, 5:9], labels[:, 40:44]], 1), query_runs=((6, 10), (40, 44)))
    assert (shifted - losses).abs()[:, :4].min() > 1e-3


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("documents", "calls"), [(True, [1, 1]), (False, [2, 2])])
def test_calls_of_attention(documents: bool, calls: list[int]) -> None:
    """Of each cross-decoder layer: one for all documents, one for each run of a sequence without."""
    model = build(tiny_config())
    seen = [0, 0]

    def count_calls(index: int):
        return lambda *_: seen.__setitem__(index, seen[index] + 1)

    for index, layer in enumerate(model.decoder.layers[2:]):
        layer.self_attention.core_attention.register_forward_hook(count_calls(index))
    tokens, labels = batch(MICRO_BATCH)
    ids = document_batch(MICRO_BATCH) if documents else None
    model(
        tokens, labels=torch.cat([labels[:, 5:9], labels[:, 40:44]], 1), document_ids=ids, query_runs=((5, 9), (40, 44))
    )
    assert seen == calls


def test_micro_batches_share_a_route() -> None:
    """Making one copies indices to the device, for which the host waits."""
    _route.cache_clear()
    hidden = torch.randn(SEQ, 1, 4)
    taken = [QueryShard(SequenceShard(SEQ, 1), ((5, 9),)).take(hidden) for _ in range(3)]
    assert all(torch.equal(one, hidden[5:9]) for one in taken)
    assert _route.cache_info().misses == 1


def test_a_suffix_is_rounded_up() -> None:
    assert suffix_run(5, 32, 4) == ((24, 32),)
    assert suffix_run(31, 32, 4) == ((0, 32),)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_query_is_dealt_once_and_each_rank_has_as_many(ranks: int) -> None:
    runs = ((0, 5), (9, 10), (14, 20))
    dealt = [dealt_runs(runs, ranks, rank) for rank in range(ranks)]
    assert {count(of_rank) for of_rank in dealt} == {12 // ranks}
    positions = sorted(position for of_rank in dealt for start, stop in of_rank for position in range(start, stop))
    assert positions == [*range(5), 9, *range(14, 20)]


def test_runs_of_the_flags() -> None:
    """Rounded up for the ranks that share the rows, and for FP8."""
    flags = dict(architecture="yoco", cross_decoder_positions="loss", loss_suffix="10", seq_length=1024)
    mesh = dict(tensor_model_parallel_size=2, context_parallel_size=1, sequence_parallel=False, fp8=None)
    mesh |= dict(loss_chunk_size=8)

    def run(**more: object) -> tuple:
        return query_positions.query_runs(Namespace(**flags | mesh | more))

    assert run() == ((1014, 1024),)
    assert run(sequence_parallel=True, context_parallel_size=2) == ((1012, 1024),)
    assert run(fp8="hybrid") == ((992, 1024),)
    assert run(cross_decoder_positions="all") is run(loss_suffix=None) is run(loss_suffix="1024") is None
