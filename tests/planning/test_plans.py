"""Search, explanation and run, on no GPU."""

import argparse
import dataclasses
import itertools
import math
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from yoco_megatron.config.yaml_files import load_config_file
from yoco_megatron.costs.card import H100, Card
from yoco_megatron.costs.memory import GIB, gpu_memory, in_flight
from yoco_megatron.costs.schedule import _order
from yoco_megatron.costs.shape import ModelShape, parameter_count
from yoco_megatron.costs.stage_time import part_seconds_of_run, stage_parameters, stage_seconds
from yoco_megatron.planning import flags, report
from yoco_megatron.planning.mesh import FILL, Plan, nearly_best_stages
from yoco_megatron.planning.run import Site, goodput, plan_run, restart_budget
from yoco_megatron.planning.search import ERROR, search, settings

ROOT = Path(__file__).parents[2]
MODELS = ["configs/model/yoco_13b.yaml", "configs/recipe/scaling_large.yaml"]
LENGTH = ["--seq-length", "4096", "--max-position-embeddings", "4096"]
REST = ["--vocab-size", "100288", *LENGTH, "--global-batch-size", "512"]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parsed(*more: str, gpus: int = 64):
    return flags.parse(["--config", *MODELS, *REST, *more], gpus)


def test_the_run_has_the_memory_and_the_stages_of_its_plan(tmp_path):
    """The tool's file, read by the trainer's own parser."""
    from yoco_megatron.startup.arguments import parse_for_job

    output = tmp_path / "plan.yaml"
    argv = ["--gpus", "64", "--pipeline-model-parallel-size", "4", "--context-parallel-size", "2"]
    tool = subprocess.run(
        [sys.executable, "-c", TOOL, "search", "--config", *MODELS, *REST, *argv, "--output", str(output)],
        capture_output=True,
        text=True,
    )
    assert tool.returncode == 0, tool.stderr
    assert "13.68B parameters" in tool.stdout and "loaded: []" in tool.stdout
    assert load_config_file(output)["pipeline-model-parallel-size"] == 4

    given, _ = flags.parse(["--config", *MODELS, str(output), *REST], 64)
    plan = Plan.of(given, H100)
    mock = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--save-interval", "10"]
    args, stages = parse_for_job(["--config", *MODELS, str(output), *REST, *mock], 64)
    args.gradient_accumulation_fusion = True  # as on a GPU
    assert [dict(stage) for stage in stages.parts()] == [dict(stage) for stage in plan.stages]
    assert gpu_memory(args, stages.parts()).parts == pytest.approx(dict(plan.memory.parts))


TOOL = """
import runpy, sys
sys.argv[0] = "tools/plan.py"
runpy.run_path("tools/plan.py", run_name="__main__")
print("loaded:", [name for name in ("torch", "numpy", "megatron") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        args, own = parsed()
    return args, search(args, own, H100)


def test_plans_fit_and_the_first_is_the_simplest_of_the_equal(found):
    args, plans = found
    assert all(plan.memory.total <= FILL * 79.1 * GIB for plan in plans.plans)
    assert [plan.time.seconds for plan in plans.plans] == sorted(plan.time.seconds for plan in plans.plans)
    assert plans.best.time.seconds <= plans.plans[0].time.seconds * (1 + ERROR)
    assert {"GPUs do not divide", "heads or widths do not divide", "states do not fit"} <= plans.discarded.keys()
    text = report.search_report(plans, settings(plans.best, args), top=4)
    assert "--micro-batch-size" in text and "states do not fit" in text


def test_the_least_recompute_that_fits(found):
    """Of the same mesh and micro-batch, one plan, and no other with less fits."""
    _, plans = found
    recomputing = next(plan for plan in plans.plans if plan.recompute == "elementwise")
    args = flags.argparse.Namespace(**vars(recomputing.args) | {"recompute_elementwise": False})
    assert not dataclasses.replace(recomputing, args=args).fits


def test_the_command_line_holds():
    args, own = parsed("--tensor-model-parallel-size", "4", "--micro-batch-size", "1", "--recompute-elementwise")
    plans = search(args, own, H100).plans
    assert {(p.args.tensor_model_parallel_size, p.args.micro_batch_size, p.recompute) for p in plans} == {
        (4, 1, "elementwise")
    }


def test_settings_take_back_what_configs_say():
    args, own = flags.parse(
        [
            *("--config", *MODELS, "recompute-granularity=full", "recompute-method=uniform", "bf16=true"),
            *("pipeline-model-parallel-layout=Et|tL", *REST),
        ],
        64,
    )
    decided = settings(search(args, own, H100).best, args)
    assert decided["pipeline-model-parallel-layout"] is None
    assert decided["recompute-granularity"] is None and decided["recompute-method"] is None


def test_one_error_where_nothing_fits():
    args, own = parsed(gpus=1)
    with pytest.raises(ValueError, match=r"no mesh for 1 GPUs \(.*states do not fit: \d+.*\): use more GPUs$"):
        search(args, own, H100)


def test_the_error_has_the_fix_of_what_came_furthest():
    args, own = parsed(gpus=100_000)
    with pytest.raises(ValueError, match=r"use another --global-batch-size, or another number of GPUs$"):
        search(args, own, H100)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--recompute-elementwise --fp8-format hybrid", "--recompute-elementwise is for bf16"),
        ("--keep-cross-attention", "--keep-cross-attention is an exception from --recompute-granularity full"),
        ("--pipeline-model-parallel-layout Et|tL", "the search cuts pipelines itself"),
        ("--fp8-format hybrid", "--fp8-format does not go with --precisions bf16"),
    ],
)
def test_no_plan_that_the_trainer_would_refuse(more, message):
    args, own = parsed(*more.split(), gpus=8)
    with pytest.raises(ValueError, match=message):
        search(args, own, H100, ("bf16",) if more == "--fp8-format hybrid" else ())


def test_virtual_stages_want_a_pipeline():
    args, own = parsed("--num-virtual-stages-per-pipeline-rank", "2", gpus=8)
    assert all(plan.args.pipeline_model_parallel_size > 1 for plan in search(args, own, H100).plans)


def test_more_memory_allows_more():
    args, own = parsed("--context-parallel-size", "1", "--micro-batch-size", "2", gpus=16)
    h100, h200 = (search(args, own, Card.of(card)) for card in ("h100", "h200"))
    assert len(h200.plans) > len(h100.plans)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 8, 13, 40])
def test_fast_stages_are_nearly_the_best(stages):
    """Against all cuts, by dynamic programming; ratios are rounded to a hundredth."""
    args, _ = parsed("--pipeline-model-parallel-size", str(stages), gpus=stages)
    shape = ModelShape.from_args(args)
    seconds = part_seconds_of_run(shape, args)
    fast = nearly_best_stages(args, shape)
    assert len(fast) == stages
    held = {part: sum(stage[part] for stage in fast) for part in fast[0]}
    assert held == {"embedding": 1, "self_decoder": 20, "shared_kv": 1, "cross_decoder": 20, "output_layer": 1}
    cost = [seconds["self_decoder"]] * 20 + [seconds["cross_decoder"]] * 20
    cost[19] += seconds["shared_kv"]
    cost[39] += seconds["output_layer"]
    sums = [0.0, *itertools.accumulate(cost)]
    best = [0.0] + [math.inf] * 40
    for _ in range(stages):
        best = [math.inf] + [max_of(best, sums, stop) for stop in range(1, 41)]
    assert max(stage_seconds(stage, seconds) for stage in fast) <= best[40] * 1.02


def max_of(best: list[float], sums: list[float], stop: int) -> float:
    """Shortest longest stage of layers before `stop`, with one stage more than `best`."""
    return min(max(best[start], sums[stop] - sums[start]) for start in range(stop))


def test_in_flight_is_what_the_schedules_begin():
    """1F1B: P - rank. Interleaved, by hand: 2 ranks, 2 chunks, 5 and 3 passes before the first backward one."""
    args, _ = parsed("--pipeline-model-parallel-size", "4", "--micro-batch-size", "1", gpus=4)
    assert [in_flight(args, rank, 1) for rank in range(4)] == [[([count], 0)] for count in (4, 3, 2, 1)]
    args.pipeline_model_parallel_size = args.world_size = 2
    first = [([3, 2], 1), ([4, 1], 1), ([4, 1], 0), ([3, 2], 0)]
    assert in_flight(args, 0, 2) == first
    assert in_flight(args, 1, 2) == [([2, 1], 1), ([2, 1], 1), ([3, 0], 0), ([3, 0], 0)]
    args.global_batch_size = 2
    assert in_flight(args, 0, 2) == [([2, 2], 1), ([2, 1], 1), ([2, 0], 0), ([1, 0], 0)]


def test_in_flight_has_the_fullest_moment():
    """Of every pass of the schedule, whatever the chunks store."""
    store = random.Random(1)
    for ranks, chunks, groups in ((2, 2, 1), (2, 6, 4), (3, 3, 2), (4, 4, 3)):
        sizes = [store.random() for _ in range(chunks)]
        args, _ = parsed("--pipeline-model-parallel-size", str(ranks), "--micro-batch-size", "1", gpus=ranks)
        args.global_batch_size = groups * ranks
        for rank in range(ranks):
            begun, live = [0] * chunks, []
            for ahead, chunk, _ in _order(rank, ranks, chunks, groups * ranks):
                if not ahead:
                    live.append(math.sumprod(begun, sizes) + 0.1 * chunk)
                begun[chunk] += 1 if ahead else -1
            moments = in_flight(args, rank, chunks)
            assert max(math.sumprod(begun, sizes) + 0.1 * chunk for begun, chunk in moments) == pytest.approx(max(live))


def test_a_loss_on_fewer_positions_takes_less_of_everything():
    whole, some = (Plan.of(parsed(*more, gpus=8)[0], H100) for more in ([], ["--loss-suffix", "512"]))
    assert some.memory.parts["cross_decoder"] == pytest.approx(whole.memory.parts["cross_decoder"] / 8)
    assert some.memory.parts["self_decoder"] == whole.memory.parts["self_decoder"]
    assert some.memory.parts["head"] == pytest.approx(whole.memory.parts["head"] / 8)
    assert some.time.seconds < 0.7 * whole.time.seconds


def test_shared_kv_over_context_and_documents():
    """Gathered, they are as many values a rank as without context parallelism; documents of several samples: a copy."""

    def kv(gpus: int, *more: str) -> float:
        args, _ = parsed("--micro-batch-size", "2", *more, gpus=gpus)
        return Plan.of(args, H100).memory.parts["shared K,V"] / (4096 * 2 * 2)  # tokens, bytes

    shape = ModelShape.from_args(parsed()[0])
    width, hidden = shape.kv_width, shape.hidden_size
    assert kv(1) == width + 2 * hidden
    assert kv(4, "--context-parallel-size", "4") == width + 2 * hidden / 4
    assert kv(1, "--dataloader-inter-document-masking") == 2 * width + 2 * hidden
    assert kv(1, "--shared-kv-sets", "5") == 5 * width + 2 * hidden


def test_explanation_adds_up(tmp_path):
    args, _ = parsed("--pipeline-model-parallel-size", "4", "--tensor-model-parallel-size", "4", gpus=64)
    plan = Plan.of(args, H100)
    text = report.explain_report(plan)
    assert f"{plan.memory.total / GIB:.2f}" in text and "K,V" in text
    assert sum(plan.time.parts.values()) == pytest.approx(plan.time.seconds)
    pytest.importorskip("matplotlib")
    report.picture(plan, str(tmp_path / "plan.svg"))
    assert "memory" in (tmp_path / "plan.svg").read_text()


def test_run_of_a_trillion_tokens(found):
    """Goodput against the formula's own minimum, and the figures against each other."""
    plan = found[1].best
    site = Site()
    run = plan_run(plan, 10**12, site)
    assert run.steps == math.ceil(10**12 / (512 * 4096))
    between = 3600 / (site.failures_per_gpu_hour * 64)
    assert run.mean_time_between_failures == between
    others = [
        goodput(between, site.save_stall, site.restart, run.save_every * factor) for factor in (0.8, 0.99, 1.01, 1.25)
    ]
    assert all(other < run.goodput for other in others)
    assert run.gpu_hours == pytest.approx(run.compute / run.goodput * 64 / 3600)
    text = report.run_report(plan, run, site, 10**12, corpus=3 * 10**11)
    assert "3.33" in text and f"{run.steps:,}" in text
    assert "WARNING: --train-iters" in text


def test_published_interval():
    """1,024 GPUs at 3.4e-5 failures a GPU-hour, stall 30 s, restart 10 min: every 41.6 min, 97.0%."""
    between = 3600 / (3.4e-5 * 1024)
    every = math.sqrt(2 * 30 * between)
    assert every / 60 == pytest.approx(41.6, abs=0.1)
    productive = goodput(between, 30, 600, every)
    assert productive == pytest.approx(0.970, abs=5e-4)
    assert restart_budget(between, 30, productive) == pytest.approx(600)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-model-parallel-size", "3"], "64 processes cannot be divided into --tensor-model-parallel-size 3"),
        (
            ["--tensor-model-parallel-size", "16"],
            "--num-attention-heads 40 is not a multiple of --tensor-model-parallel",
        ),
        (["--context-parallel-size", "0"], "--context-parallel-size 0 must be at least 1"),
        (["--micro-batch-size", "0"], "--micro-batch-size 0 must be at least 1"),
        (["--micro-batch-size", "16"], "--global-batch-size 512 is not a multiple of --micro-batch-size 16 x 64"),
        (["--pipeline-model-parallel-size", "64"], "64 pipeline stages .* are more than --num-layers 40"),
        (["--pipeline-model-parallel-layout", "Et|tL", "--pipeline-model-parallel-size", "2"], "with 40 t in all"),
        (["--pipeline-model-parallel-layout", "Et|tL"], "--pipeline-model-parallel-layout needs --pipeline-model"),
        (["--mtp-num-layers", "1", "--cuda-graph-impl", "full_iteration"], "--cuda-graph-impl is not built for --mtp"),
        (["--num-virtual-stages-per-pipeline-rank", "4"], "needs --pipeline-model-parallel-size above 1"),
    ],
)
def test_meshes_that_cannot_be(flags, message):
    with pytest.raises(ValueError, match=message):
        Plan.of(parsed(*flags)[0], H100)


@pytest.mark.parametrize("ranks", [1, 2])
def test_multi_token_prediction_is_in_every_plan(ranks):
    """Its layers are held by the last stage, with a copy of the embedding if that is not the first."""
    args, _ = parsed("--mtp-num-layers", "2", "--pipeline-model-parallel-size", str(ranks))
    plan = Plan.of(args, H100)
    parts = parameter_count(plan.shape)
    held = sum(stage_parameters(stage, plan.shape) for stage in plan.stages)
    assert parts["mtp"] and held == sum(parts.values()) + (ranks - 1) * parts["embedding"]
    assert "MTP head" in report.explain_report(plan)


def test_multi_token_prediction_sends_as_layers_of_the_cross_decoder_do():
    more = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--context-parallel-size", "2"]
    shares = []
    for layers in ("0", "2"):
        plan = Plan.of(parsed(*more, "--mtp-num-layers", layers)[0], H100)
        shares.append({part: plan.time.stages[0][part] for part in ("tensor", "compute")})
    assert shares[1]["tensor"] == pytest.approx(shares[0]["tensor"] * 42 / 40)  # of 40 layers
    assert shares[1]["compute"] > shares[0]["compute"] * 42 / 40  # and projections, and two heads more


def test_runs_that_cannot_be(found):
    args, _ = parsed(gpus=8)
    with pytest.raises(ValueError, match=r"DP8 needs .* GiB of a GPU's 79.1: find a mesh by search"):
        plan_run(Plan.of(args, H100), 10**12, Site())
    with pytest.raises(ValueError, match="makes no progress: a failure every 1 min"):
        plan_run(found[1].best, 10**12, Site(failures_per_gpu_hour=1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"failures_per_gpu_hour": rate} for rate in (0.0, -1.0, math.inf, math.nan)),
        *({"save_stall": seconds} for seconds in (0.0, math.inf, math.nan)),
        *({"restart": seconds} for seconds in (-1.0, math.inf, math.nan)),
        *({"power_usage": share} for share in (0.9, math.inf, math.nan)),
    ],
)
def test_sites_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"^--"):
        Site(**wrong)


def test_what_the_tool_itself_checks():
    tool = runpy.run_path(str(ROOT / "tools" / "plan.py"), run_name="plan")
    with pytest.raises(ValueError, match="--max-position-embeddings 512 is below --seq-length 4096"):
        tool["main"](["search", "--config", *MODELS, *REST, "--max-position-embeddings", "512", "--gpus", "8"])
    assert [tool["token_count"](text) for text in ("12_000", "300B", "1.6t")] == [12_000, 3 * 10**11, 16 * 10**11]
    wrong = {"token_count": ("0", "0.1", "-5", "1.5.5T", "10P"), "gpu_count": ("0", "-3", "1e3", "")}
    for count, texts in wrong.items():
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match="is not a number of"):
                tool[count](text)


def test_a_transformers_stages_are_megatrons():
    """By hand for 26 layers in four stages: with embedding and loss as a layer each, seven places a stage."""

    def layers(*more: str) -> list[int]:
        words = "--config configs/model/transformer_3b.yaml configs/recipe/scaling.yaml --vocab-size 100288"
        words += " --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
        args, _ = flags.parse([*words.split(), *more], 2)
        return [stage["decoder"] for stage in Plan.of(args, H100).stages]

    ends = ["--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"]
    assert layers(*ends) == [6, 7, 7, 6]
    assert sum(layers()) == 26


BLOCK = ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers"]


def test_block_recompute_lies_between_none_and_all():
    """Of the first N layers of each half of a stage: more of them take less memory and more time, all as uniform."""

    def plan(*more: str) -> Plan:
        return Plan.of(parsed("--pipeline-model-parallel-size", "2", "--micro-batch-size", "1", *more, gpus=8)[0], H100)

    uniform = plan("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
    plans = [plan(), *(plan(*BLOCK, str(layers)) for layers in (1, 7, 20))]
    activations = [sum(each.memory.parts[kind] for kind in ("self_decoder",)) for each in plans]
    assert activations == sorted(activations, reverse=True) and len(set(activations)) == 4
    seconds = [each.time.seconds for each in plans]
    assert seconds == sorted(seconds) and len(set(seconds)) == 4
    stages = list(plans[0].stages)
    every = max(max(stage.values()) for stage in stages)
    of_all = plan(*BLOCK, str(every))
    assert of_all.memory.total == pytest.approx(uniform.memory.total)
    assert sum(of_all.time.parts.values()) == pytest.approx(uniform.time.seconds, rel=0.02)  # other cuts


def test_the_search_recomputes_as_few_layers_as_fit():
    args, own = flags.parse(
        [
            *("--config", *MODELS, "--vocab-size", "100288", "--global-batch-size", "64"),
            *("--seq-length", "16384", "--max-position-embeddings", "16384"),
        ],
        16,
    )
    blocks = [plan for plan in search(args, own, H100).plans if plan.args.recompute_method == "block"]
    assert blocks
    for plan in blocks[:5]:
        fewer = flags.argparse.Namespace(**vars(plan.args))
        fewer.recompute_num_layers -= 1
        if fewer.recompute_num_layers == 0:
            fewer.recompute_granularity = None
        assert not dataclasses.replace(plan, args=fewer).fits


def test_a_search_over_a_hundred_thousand_gpus():
    configs = ["configs/model/yoco_405b.yaml", "configs/recipe/405b_10t.yaml"]
    args, own = flags.parse(["--config", *configs, "--vocab-size", "100288"], 98_304)
    found = search(args, own, H100)
    assert found.best.fits and found.best.args.world_size == 98_304
