"""The planner's cuts are the best there are (by brute force on small cases), its table adds up, and wrong layouts are
errors that name the flag."""

import itertools
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from yoco_megatron.costs.flops import forward_flops_per_token, layer_flops_per_token
from yoco_megatron.costs.shape import ModelShape, parameter_count
from yoco_megatron.costs.stage_time import (
    PLANNER_RATES,
    Seconds,
    kv_sets_arriving,
    kv_sets_read,
    memory_of_stages,
    part_seconds,
    part_seconds_of_run,
    stage_gflop,
    stage_parameters,
    stage_seconds,
)
from yoco_megatron.parallel.pipeline import planner
from yoco_megatron.parallel.pipeline.layout import plan_stages, set_layout
from yoco_megatron.parallel.pipeline.stages import StagePlan, layout_string
from yoco_megatron.planning.flags import parse


def shape(**changes) -> ModelShape:
    fields = dict(
        architecture="yoco",
        self_decoder="gated_retention",
        num_layers=8,
        num_self_decoder_layers=4,
        hidden_size=256,
        ffn_hidden_size=768,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=64,
        self_decoder_heads=2,
        self_decoder_head_dim=128,
        self_decoder_query_groups=2,
        self_decoder_window=64,
        padded_vocab_size=4096,
        seq_length=512,
        tied=False,
    )
    return ModelShape(**fields | changes)


def plan(counts, split_layer: int, kv_sets: int = 1) -> StagePlan:
    return StagePlan((0, *itertools.accumulate(counts)), split_layer, kv_sets)


PARTS = ("embedding", "self_decoder", "shared_kv", "cross_decoder", "output_layer")


def random_seconds(generator: torch.Generator) -> Seconds:
    numbers = torch.rand(5, generator=generator) * torch.tensor([0.1, 1, 0.5, 2, 3])
    return dict(zip(PARTS, numbers.tolist()))


def times(counts, split_layer: int, seconds: Seconds) -> list[float]:
    return [stage_seconds(parts, seconds) for parts in plan(counts, split_layer).parts()]


@pytest.mark.parametrize("split_layer", [0, 3, 7])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_longest_stage_is_as_short_as_can_be(ranks: int, split_layer: int, generator: torch.Generator) -> None:
    for _ in range(20):
        seconds = random_seconds(generator)
        ours = planner.plan_cuts(8, split_layer, ranks, 1, seconds)
        possible = (c for c in itertools.product(range(1, 9), repeat=ranks) if sum(c) == 8)
        best = min(max(times(counts, split_layer, seconds)) for counts in possible)
        assert sum(ours) == 8
        assert max(times(ours, split_layer, seconds)) == pytest.approx(best)


def test_virtual_stages_balance_ranks(generator: torch.Generator) -> None:
    """With two chunks a rank the busiest rank is at most as busy as with even chunks."""
    for _ in range(20):
        seconds = random_seconds(generator)
        ours = times(planner.plan_cuts(16, 8, 2, 2, seconds), 8, seconds)
        even = times([4, 4, 4, 4], 8, seconds)
        assert max(sum(ours[r::2]) for r in (0, 1)) <= max(sum(even[r::2]) for r in (0, 1)) + 1e-12


def test_longer_sequences_move_the_cut_towards_fewer_cross_layers() -> None:
    short, long = (
        planner.plan_cuts(
            24, 12, 2, 1, part_seconds(shape(num_layers=24, num_self_decoder_layers=12, seq_length=length))
        )
        for length in (512, 262144)
    )
    assert long[1] < short[1]


def test_bubble_of_equal_stages() -> None:
    """(P-1) / (m + P-1) for 1F1B, (P-1) / (m V + P-1) interleaved."""
    assert planner.bubbles([1.0] * 4, 4, 8) == pytest.approx([3 / 11] * 4)
    assert planner.bubbles([0.5] * 8, 4, 8) == pytest.approx([3 / 19] * 4)


@pytest.mark.parametrize("tied", [False, True])
def test_table_adds_up(tied: bool) -> None:
    model = shape(tied=tied)
    cuts = plan([3, 3, 2], 4)
    copy = parameter_count(model)["embedding"] if tied else 0
    assert sum(stage_parameters(parts, model) for parts in cuts.parts()) == sum(parameter_count(model).values()) + copy
    flops = 3 * sum(forward_flops_per_token(model).values()) / 1e9
    assert sum(stage_gflop(parts, model) for parts in cuts.parts()) == pytest.approx(flops)
    text = planner.table(cuts, model, part_seconds(model), 3, 8, 2, 2)
    # Into the last stage go hidden states and K,V: 2 x 512 tokens x (256 + 2 x 2 x 64) values x 2 bytes.
    assert f"{2 * 512 * (256 + 256) * 2 / 1e6:.2f}" in text.splitlines()[-1]
    assert "K,V" in text.splitlines()[3]


def test_where_the_shared_kv_are() -> None:
    cuts = plan([2, 3, 3, 0], 4)  # the split inside stage 1, the head alone on the last stage
    assert [cuts.stage(g).kv_sources for g in range(4)] == [(), (4,), (), ()]
    assert [len(cuts.kv_arriving(g)) for g in range(4)] == [0, 0, 1, 0]
    assert cuts.kv_reads == 2
    assert plan([0, 4, 4], 0).stage(0).kv_sources == (0,)
    assert len(plan([4, 4], 4).stage(0).kv_out) == 1


def test_where_several_sets_are() -> None:
    """They travel as far as a layer reads them; cross-decoder layers 4, 5 | 6, 7, or each its own."""
    cuts = plan([4, 1, 2, 1, 0], 4, kv_sets=2)
    assert [len(cuts.kv_arriving(g)) for g in range(5)] == [0, 2, 2, 1, 0]
    assert [len(cuts.stage(g).kv_out) for g in range(5)] == [2, 2, 1, 0, 0]
    read = kv_sets_read(cuts.parts(), shape(shared_kv_sets=2))
    assert [len(sets) for sets in read] == [0, 1, 2, 1, 0] and cuts.kv_reads == 1 + 2 + 1
    assert [len(plan([3, 3, 2], 4, kv_sets=4).kv_arriving(g)) for g in range(3)] == [0, 0, 2]
    assert plan([3, 3, 2], 4, kv_sets=4).kv_reads == 4


def test_where_sets_of_several_sources_are() -> None:
    """Each begins behind its source, and ends with its last reader; layer 4 reads the first source's, 5 the next."""
    model = shape(shared_kv_sets=4, shared_kv_sources=(1, 3))
    cuts = StagePlan.of(model, [1, 1, 2, 1, 2, 1])
    assert [cuts.stage(g).kv_sources for g in range(6)] == [(1,), (), (3,), (), (), ()]
    arriving = [range(0), range(0, 2), range(0, 2), range(0, 4), range(1, 4), range(3, 4)]
    assert [cuts.stage(g).kv_in for g in range(6)] == kv_sets_arriving(cuts.parts(), model) == arriving
    assert [cuts.stage(g).kv_out for g in range(6)] == [*arriving[1:], range(0)]
    count, seconds = parameter_count(model), part_seconds(model)
    assert sum(stage_parameters(parts, model) for parts in cuts.parts()) == sum(count.values())
    assert count["shared_kv"] == 2 * (256 + 2 * 256 * model.kv_width)  # a norm and two sets each
    times = planner.layer_seconds(8, 4, seconds, (1, 3))
    assert times[2] - times[1] == pytest.approx(seconds["shared_kv"])


def test_where_the_memory_of_units_is() -> None:
    """From behind layer 1, the last recurrent one, to the unit 6; K,V of layer 3 to the last that attends, 7, or 5."""
    model = shape(self_decoder="RRSS", cross_decoder_pattern="AGGA")
    cuts = StagePlan.of(model, [1, 1, 2, 2, 1, 1])
    assert [cuts.stage(g).memory_in for g in range(6)] == [False, False, True, True, True, False]
    assert [cuts.stage(g).memory_out for g in range(6)] == [False, True, True, True, False, False]
    assert memory_of_stages(cuts.parts(), model) == [(g == 1, cuts.stage(g).memory_in) for g in range(6)]
    assert [len(cuts.kv_arriving(g)) for g in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [len(sets) for sets in kv_sets_read(cuts.parts(), model)] == [0, 0, 0, 1, 1, 1]
    at_ends = shape(self_decoder="RRSS", cross_decoder_pattern="GAGG")
    cuts = StagePlan.of(at_ends, [4, 1, 1, 1, 1])
    assert [len(cuts.kv_arriving(g)) for g in range(5)] == [len(of) for of in kv_sets_arriving(cuts.parts(), at_ends)]
    assert [len(cuts.kv_arriving(g)) for g in range(5)] == [0, 1, 1, 0, 0] and cuts.kv_reads == 1
    assert [len(sets) for sets in kv_sets_read(cuts.parts(), at_ends)] == [0, 0, 1, 0, 0]
    assert sum(cuts.memory_arrives(g) for g in range(5)) == 4
    text = planner.table(StagePlan.of(model, [4, 4]), model, part_seconds(model), 2, 8, 2, 2)
    # Hidden states, K,V, and the memory of 2 heads of width 128.
    assert f"{2 * 512 * (256 + 256 + 256) * 2 / 1e6:.2f}" in text.splitlines()[-1]


def flags(**changes) -> Namespace:
    fields = dict(
        pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout=None,
        num_layers_per_virtual_pipeline_stage=None,
        num_virtual_stages_per_pipeline_rank=None,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        recompute_granularity=None,
        recompute_method=None,
        loss_chunk_size=0,
        micro_batch_size=2,
        seq_length=4096,
        context_parallel_size=1,
        retention_backend="auto",
        keep_cross_attention=False,
    )
    return Namespace(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "layout"),
    [
        (dict(num_layers_per_virtual_pipeline_stage=2), "Ett|tt|tt|ttL"),
        (dict(pipeline_model_parallel_layout="Et|tttttttL"), "Et|tttttttL"),
        (dict(decoder_first_pipeline_num_layers=3), "Ettt|tttttL"),
        (dict(decoder_last_pipeline_num_layers=1, pipeline_model_parallel_size=2), "Ettttttt|tL"),
    ],
)
def test_flags_become_a_layout(changes: dict, layout: str) -> None:
    args = flags(**changes)
    cuts = plan_stages(args, shape())
    set_layout(args, cuts)
    counts = [last - first for first, last in itertools.pairwise(cuts.cuts)]
    assert args.pipeline_model_parallel_layout == layout == layout_string(counts)
    assert args.num_layers_per_virtual_pipeline_stage is None


def test_what_is_recomputed_costs_a_fourth_product() -> None:
    """Three products, forward and two gradients, become four: of the head with the loss in chunks, of layers with full
    recompute. Of the rest nothing changes."""
    full = dict(recompute_granularity="full", recompute_method="uniform")
    once, whole, chunked, recomputed, both = (
        part_seconds_of_run(shape(), flags(**changes))
        for changes in (
            {},
            dict(loss_chunk_size=8192),
            dict(loss_chunk_size=2048),
            full,
            dict(loss_chunk_size=2048) | full,
        )
    )
    assert whole == once  # the last chunk's logits are stored, here all
    assert chunked == once | {"output_layer": pytest.approx(once["output_layer"] * (1 + 3 / 4 / 3))}
    layers = {name: pytest.approx(once[name] * 4 / 3) for name in ("self_decoder", "cross_decoder")}
    assert recomputed == once | layers
    assert both == once | layers | {"output_layer": chunked["output_layer"]}
    stored = part_seconds_of_run(shape(), flags(keep_cross_attention=True, **full))
    attention = layer_flops_per_token(shape())["cross_decoder"]["mixing"] / PLANNER_RATES.attention
    cross = pytest.approx(recomputed["cross_decoder"] - attention / 3)
    assert stored == recomputed | {"cross_decoder": cross}


def test_retention_in_torch_is_slower() -> None:
    """So that a stage has fewer of its layers."""
    kernel, slow = (part_seconds_of_run(shape(), flags(retention_backend=name)) for name in ("auto", "torch"))
    assert slow == kernel | {"self_decoder": slow["self_decoder"]} and slow["self_decoder"] > kernel["self_decoder"]


def test_a_loss_in_chunks_moves_layers_away_from_the_head() -> None:
    """A vocabulary so large that the head costs as much as some layers."""
    model = shape(num_layers=24, num_self_decoder_layers=12, padded_vocab_size=131072)
    plain, chunked = (plan_stages(flags(loss_chunk_size=size), model).cuts[1] for size in (0, 2048))
    assert chunked > plain


def test_planner_is_the_default() -> None:
    args = flags(num_virtual_stages_per_pipeline_rank=2)
    assert plan_stages(args, shape()).count == 4
    assert plan_stages(flags(pipeline_model_parallel_size=1), shape()) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pipeline_model_parallel_layout="Ettt|tttL"), "6 layers .* do not add up to --num-layers 8"),
        (dict(pipeline_model_parallel_layout="tttt|ttttL"), "must begin with the embedding E"),
        (dict(pipeline_model_parallel_layout="Etttt|tttt"), "end with the loss L"),
        (dict(pipeline_model_parallel_layout="Ettt|ttt|ttL"), "3 stages are not a multiple of --pipeline"),
        (dict(pipeline_model_parallel_layout="Etttt||tt|ttL"), "stage 1 is empty"),
        (dict(pipeline_model_parallel_layout="Etttx|ttttL"), "--pipeline-model-parallel-layout"),
        (dict(pipeline_model_parallel_layout="Etttt|tttt,mL"), "multi-token prediction"),
        (dict(pipeline_model_parallel_size=9), "more than --num-layers 8"),
        (dict(num_virtual_stages_per_pipeline_rank=5), "more than --num-layers 8"),
        (dict(num_layers_per_virtual_pipeline_stage=3), "--num-layers-per-virtual-pipeline-stage 3"),
        (dict(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=3), "does not divide"),
        (
            dict(pipeline_model_parallel_layout="Etttt|ttttL", num_virtual_stages_per_pipeline_rank=2),
            "contradict each other",
        ),
        (dict(pipeline_model_parallel_size=1, pipeline_model_parallel_layout="EttttttttL"), "above 1"),
    ],
)
def test_wrong_layouts(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_stages(flags(**changes), shape())


def test_a_head_alone_has_a_loss_everywhere() -> None:
    """Hidden states of fewer tokens would arrive than the stage expects."""
    args = flags(pipeline_model_parallel_layout="Etttttttt|L")
    assert plan_stages(args, shape()).count == 2
    with pytest.raises(ValueError, match="give it a layer by --pipeline-model-parallel-layout"):
        plan_stages(args, shape(num_queries=16))
    units = flags(pipeline_model_parallel_layout="Etttttt|ttL")
    assert plan_stages(units, shape(num_queries=16, cross_decoder_pattern="AAGA")).count == 2
    with pytest.raises(ValueError, match="units alone at the end of --cross-decoder-pattern AAGG"):
        plan_stages(units, shape(num_queries=16, cross_decoder_pattern="AAGG"))


def test_filled_stages_are_a_start_of_their_own():
    """70B on eight ranks with six chunks each: from the other two starts alone ranks idle for 8.1% of the time."""
    root = Path(__file__).parents[2]
    configs = ["--config", f"{root}/configs/model/yoco_70b.yaml", f"{root}/configs/recipe/70b_10t.yaml"]
    args, _ = parse([*configs, "--vocab-size", "100288"], 2048)
    seconds = part_seconds_of_run(ModelShape.from_args(args), args)
    of_layers = planner.layer_seconds(72, 36, seconds)
    counts = planner.filled_cuts(of_layers, 48)
    assert sum(counts) == 72 and len(counts) == 48
    planned = planner.plan_cuts(72, 36, 8, 6, seconds)

    def busiest(counts: list[int]) -> float:
        edges = [0, *itertools.accumulate(counts)]
        stages = [sum(of_layers[first:last]) for first, last in itertools.pairwise(edges)]
        return max(sum(stages[rank::8]) for rank in range(8))

    assert busiest(planned) <= busiest(counts)
    assert 1 - sum(of_layers) / 8 / busiest(planned) < 0.065
