"""How often context-parallel ranks talk, and how many bytes each gets: the formulas of docs/context_parallel.md.

Every collective over the context-parallel group is counted, in forward and in backward, at shapes that are all
different. The counts are the same on all ranks, so that none can wait for another in vain.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from support.models import FULL_RECOMPUTE, SEQ, STORED_ATTENTION, batch, build, document_batch, tiny_config
from support.pipeline import MICRO_BATCH, of_this_rank, pipeline_step
from support.worlds import run_world
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yoco_megatron.convert.config_fields import OF_MIXERS
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.traffic import boundary_bytes, cross_attention_bytes, received_bytes
from yoco_megatron.parallel.context.query_shard import Runs
from yoco_megatron.parallel.pipeline.communicator import SharedKVCommunicator
from yoco_megatron.parallel.pipeline.stages import StagePlan

BATCH, BYTES = 3, 8  # float64, states included
CONFIG = tiny_config()
HEADS, WIDTH = CONFIG.self_decoder_heads, CONFIG.hidden_size // CONFIG.self_decoder_heads
CROSS_GROUPS, CROSS_WIDTH = CONFIG.num_query_groups, CONFIG.kv_channels
LAYERS = CONFIG.num_self_decoder_layers


class Traffic:
    """(collective, direction) -> bytes received by this rank from others, call by call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.direction = "forward"
        for name, received in (
            ("all_gather_into_tensor", lambda out, x, *_: out.nbytes - x.nbytes),
            ("reduce_scatter_tensor", lambda out, x, *_: x.nbytes - out.nbytes),
            ("all_to_all_single", self._all_to_all),
        ):
            monkeypatch.setattr(dist, name, self._counted(name, getattr(dist, name), received))

    def _counted(self, name, collective, received):
        def call(*args, group=None, **kwargs):
            if group is mpu.get_context_parallel_group():
                self.calls[name, self.direction].append(received(*args))
            return collective(*args, group=group, **kwargs)

        return call

    @staticmethod
    def _all_to_all(out, x, receive=None, send=None):
        me, ranks = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
        if receive is None:
            return out.nbytes // ranks * (ranks - 1)
        row = (out if sum(receive) else x)[:1].nbytes
        return (sum(receive) - receive[me]) * row


def step(
    overrides: dict,
    documents: bool = False,
    only_first_chunk: bool = False,
    dtype: torch.dtype = torch.float64,
    query_runs: Runs | None = None,
) -> dict:
    """Traffic of one forward and backward; the loss is of all tokens that are computed, or of the first chunk's."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        traffic = Traffic(monkeypatch)
        config = tiny_config(
            context_parallel_size=mpu.get_context_parallel_world_size(), params_dtype=dtype, **overrides
        )
        model = build(config).train()
        tokens, _ = batch(BATCH)
        positions = torch.arange(SEQ).expand(BATCH, -1)
        tokens, positions = of_this_rank(tokens, positions)
        logits = model(tokens, document_ids=document_batch(BATCH) if documents else None, query_runs=query_runs)
        traffic.direction = "backward"
        if query_runs:
            positions = torch.zeros(logits.shape[:2])
        counted = positions < SEQ // (2 * config.context_parallel_size) if only_first_chunk else positions >= 0
        (logits.square().sum(-1) * counted).sum().backward()
        return dict(traffic.calls)


def halo_bytes(rank: int, ranks: int, window: int) -> int:
    """By the definition: the keys and values that the windows of a rank's tokens reach and the rank does not hold."""
    chunk = SEQ // (2 * ranks)
    rows = 0
    for index in (rank, 2 * ranks - 1 - rank):
        start = index * chunk
        others = [p for p in range(max(0, start - window + 1), start) if p // chunk not in (rank, 2 * ranks - 1 - rank)]
        rows += len(others)
    return rows * BATCH * 2 * HEADS * WIDTH * BYTES


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [2, 5, 17, SEQ])
@pytest.mark.parametrize("ranks", [2, 4])
def test_windows_and_shared_kv(ranks: int, window: int, documents: bool) -> None:
    model = dict(self_decoder="sliding_window", self_decoder_window=window)
    shared_kv = (ranks - 1) * SEQ // ranks * BATCH * 2 * CROSS_GROUPS * CROSS_WIDTH * BYTES
    for rank, calls in enumerate(run_world(ranks, step, model, documents, cp=ranks)):
        halo = [halo_bytes(rank, ranks, window)] * LAYERS
        back = sum(halo_back_bytes(rank, ranks, window) for _ in range(LAYERS))
        assert calls["all_to_all_single", "forward"] == halo
        assert sum(calls["all_to_all_single", "backward"]) == back
        assert len(calls["all_to_all_single", "backward"]) == LAYERS
        assert calls["all_gather_into_tensor", "forward"] == [shared_kv]
        assert calls["reduce_scatter_tensor", "backward"] == [shared_kv]
        assert len(calls) == 4


def halo_back_bytes(rank: int, ranks: int, window: int) -> int:
    """Gradients come back for each row that another rank's windows reach, once for each of its chunks."""
    chunk, own = SEQ // (2 * ranks), (rank, 2 * ranks - 1 - rank)
    rows = sum(
        p // chunk in own
        for index in range(2 * ranks)
        if index not in own
        for p in range(max(0, index * chunk - window + 1), index * chunk)
    )
    return rows * BATCH * 2 * HEADS * WIDTH * BYTES


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("ranks", "kv_sets"), [(2, 1), (4, 1), (2, 2)])
def test_retention_and_shared_kv(ranks: int, kv_sets: int, documents: bool) -> None:
    shared_kv = (ranks - 1) * SEQ // ranks * BATCH * 2 * CROSS_GROUPS * CROSS_WIDTH * BYTES
    state = (ranks - 1) * 2 * BATCH * HEADS * WIDTH * WIDTH * BYTES
    decay = (ranks - 1) * 2 * BATCH * HEADS * BYTES
    model = dict(self_decoder="gated_retention", shared_kv_sets=kv_sets)
    for calls in run_world(ranks, step, model, documents, cp=ranks):
        assert calls == {
            ("all_gather_into_tensor", "forward"): [state + decay] * LAYERS + [shared_kv] * kv_sets,
            ("reduce_scatter_tensor", "backward"): [shared_kv] * kv_sets,
            ("all_gather_into_tensor", "backward"): [state] * LAYERS,
        }


def test_recompute_gathers_the_shared_kv_no_second_time() -> None:
    for calls in run_world(2, step, dict(self_decoder="gated_retention", **FULL_RECOMPUTE), cp=2):
        assert len(calls["all_gather_into_tensor", "forward"]) == LAYERS + 1
        assert len(calls["all_gather_into_tensor", "backward"]) == 2 * LAYERS
        assert len(calls["reduce_scatter_tensor", "backward"]) == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["gated_retention", "sliding_window"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_waits_for_one_that_has_nothing_to_give(ranks: int, kind: str) -> None:
    """A loss of the first chunk's tokens alone: no other chunk has a gradient, and the first has nothing before it."""
    results = run_world(ranks, step, dict(self_decoder=kind), False, True, cp=ranks)
    whole = run_world(ranks, step, dict(self_decoder=kind), cp=ranks)
    assert results == whole


def pipelined(of_kv: dict, layout: str, num_microbatches: int) -> dict:
    """Traffic of a whole pipeline schedule."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        traffic = Traffic(monkeypatch)
        model = dict(self_decoder="sliding_window", **of_kv)
        pipeline_step(model, layout, False, num_microbatches)
        return dict(traffic.calls)


@pytest.mark.parametrize(
    ("of_kv", "read"),
    [({}, [1, 1, 1]), (dict(shared_kv_sets=4), [1, 1, 2]), (dict(shared_kv_sources=(1, 4)), [1, 1, 1])],
    ids=["one set", "four sets", "two sources"],
)
def test_once_for_each_set_stage_and_micro_batch(of_kv: dict, read: list[int]) -> None:
    """Stages: self-decoder; the rest of it and a cross-decoder layer; one more; two more. float32."""
    number = 3
    shared_kv = SEQ // 2 * MICRO_BATCH * 2 * CROSS_GROUPS * CROSS_WIDTH * 4
    results = run_world(8, pipelined, of_kv, "Ett|ttt|t|ttL", number, pp=4, cp=2)
    gathers = [sum(calls.get(("all_gather_into_tensor", "forward"), [])) for calls in results]
    scatters = [sum(calls.get(("reduce_scatter_tensor", "forward"), [])) for calls in results]
    wanted = [number * sets * shared_kv for sets in (0, *read) for _ in range(2)]  # two ranks for each stage
    assert gathers == scatters == wanted


def boundaries(model: dict, layout: str) -> int:
    """Bytes that this rank of a pipeline receives in one schedule, forward and backward."""
    received = 0
    communicate = SharedKVCommunicator._communicate

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal received
        *tensors, handles = communicate(*args, **kwargs)
        received += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return *tensors, handles

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(SharedKVCommunicator, "_communicate", counted)
        pipeline_step(model, layout, False, 2)
    return received


def test_boundaries_carry_what_later_stages_read() -> None:
    """Stages of the self-decoder, its memory behind layer 0; units 4 and 6, attention 5 and 7; of two micro-batches."""
    model = dict(self_decoder="RSSS", cross_decoder_pattern="GAGA")
    hidden, memory, kv = CONFIG.hidden_size, HEADS * WIDTH, 2 * CROSS_GROUPS * CROSS_WIDTH
    cuts = [hidden + memory, hidden + memory + kv, hidden + kv]
    received = run_world(4, boundaries, model, "Ett|ttt|tt|tL", pp=4)
    each = [2 * MICRO_BATCH * SEQ * values * 4 for values in cuts]
    assert received == [each[0], each[0] + each[1], each[1] + each[2], each[2]]
    shape = replace(shape_of("gated_retention"), num_layers=8, num_self_decoder_layers=4, **model)
    plan = StagePlan.of(shape, [2, 3, 2, 1])
    for g, values in enumerate(cuts, 1):
        sent = boundary_bytes(shape, MICRO_BATCH * SEQ, 4, len(plan.kv_arriving(g)), plan.memory_arrives(g))
        assert sent == MICRO_BATCH * SEQ * values * 4


def shape_of(kind: str, num_queries: int | None = None, kv_sets: int = 1) -> ModelShape:
    """The shape of `tiny_config`, with windows of 5."""
    return ModelShape(
        architecture="yoco",
        self_decoder=kind,
        num_layers=CONFIG.num_layers,
        num_self_decoder_layers=LAYERS,
        hidden_size=CONFIG.hidden_size,
        ffn_hidden_size=CONFIG.ffn_hidden_size,
        num_attention_heads=CONFIG.num_attention_heads,
        num_query_groups=CROSS_GROUPS,
        kv_channels=CROSS_WIDTH,
        self_decoder_heads=HEADS,
        self_decoder_head_dim=WIDTH,
        self_decoder_query_groups=HEADS,
        self_decoder_window=5,
        padded_vocab_size=None,
        **{name: getattr(CONFIG, name) for name in OF_MIXERS},
        seq_length=SEQ,
        tied=False,
        num_queries=num_queries,
        shared_kv_sets=kv_sets,
    )


def test_the_formulas() -> None:
    """What the planner's figures say for bf16 is what is counted for float32, but for the size of a value."""
    models = (
        ("gated_retention", 2, {}),
        ("sliding_window", 1, FULL_RECOMPUTE),
        ("mamba2", 1, {}),
        ("gated_delta_net", 1, {}),
        ("GS", 1, FULL_RECOMPUTE),
        ("mamba2", 1, dict(cross_decoder_pattern="GA")),  # a gated memory unit reads the memory of its own tokens
    )
    for kind, kv_sets, more in models:
        overrides = dict(self_decoder=kind, self_decoder_window=5, shared_kv_sets=kv_sets)
        results = run_world(4, step32, overrides | more, cp=4)
        counted = sum(sum(map(sum, calls.values())) for calls in results) / 4
        recompute = more is FULL_RECOMPUTE
        assert counted == sum(received_bytes(shape_of(kind, None, kv_sets), 4, BATCH, 4, recompute).values())


def step32(overrides: dict) -> dict:
    return step(overrides, dtype=torch.float32)


class LargestKV(TorchDispatchMode):
    """The most rows that any tensor of K,V had: its last dimensions are those of the shared K,V."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-3:] == (CROSS_GROUPS, 2, CROSS_WIDTH):
                self.rows = max(self.rows, tensor.shape[:-3].numel() // BATCH)
        return out


QUERIES = 16


RUNS = ((SEQ - QUERIES, SEQ),)


def suffix_step(overrides: dict) -> dict:
    """Traffic of a cross-decoder at the last positions, without that of `QueryShard.take`."""
    calls = step(overrides, dtype=torch.float32, query_runs=RUNS)
    del calls["all_to_all_single", "forward"][0], calls["all_to_all_single", "backward"][-1]
    return calls


def test_keys_for_few_queries() -> None:
    model = dict(self_decoder="gated_retention", cp_cross_attention="keys")
    wanted = sum(received_bytes(shape_of("gated_retention", QUERIES), 4, BATCH, 4).values())
    assert [sum(map(sum, calls.values())) for calls in run_world(4, suffix_step, model, cp=4)] == [wanted] * 4


def largest_kv(function: Callable, *args: Any) -> tuple[Any, int]:
    with LargestKV() as largest:
        return function(*args), largest.rows


@pytest.mark.parametrize("recompute", [{}, FULL_RECOMPUTE, STORED_ATTENTION], ids=["not", "full", "all but attention"])
def test_travelling_queries(recompute: dict) -> None:
    """Their bytes; and no rank holds the K,V of the whole sequence, nor their gradient."""
    model = dict(self_decoder="gated_retention", cp_cross_attention="queries") | recompute
    shape, kept = shape_of("gated_retention", QUERIES), recompute == STORED_ATTENTION
    wanted = sum(received_bytes(shape, 4, BATCH, 4, bool(recompute), kept, "queries").values())
    for calls, rows in run_world(4, largest_kv, suffix_step, model, cp=4):
        assert sum(map(sum, calls.values())) == wanted
        assert rows == SEQ // 4
    if not recompute:  # at all positions each rank does
        assert [rows for _, rows in run_world(2, largest_kv, step, model, cp=2)] == [SEQ] * 2


def test_what_is_fewer_bytes_travels() -> None:
    """The 3B on four ranks in bf16: K,V of 2 x 8 heads once, or tensors of 24 heads in each of 13 layers."""

    def ways(length: int, **more: int) -> dict:
        sizes = SimpleNamespace(
            num_attention_heads=24, num_query_groups=8, kv_channels=128, num_cross_decoder_layers=13
        )
        return cross_attention_bytes(sizes, 4, length, 4096, **more)

    once = ways(1 << 20)
    assert once["keys"] == 3 / 4 * (1 << 20) * 2048 * 6
    assert once["queries"] == 3 / 4 * 4096 * 24 * 13 * (6 * 128 * 2 + 8)
    assert once["queries"] < once["keys"] / 6
    assert ways(1 << 17)["queries"] > ways(1 << 17)["keys"]
    assert ways(1 << 20, kv_reads=3)["keys"] == 3 * once["keys"]
    assert ways(1 << 20, forward_passes=2)["queries"] == once["queries"] + 3 / 4 * 4096 * 24 * 13 * (2 * 128 * 2 + 4)
