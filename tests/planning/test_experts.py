"""Plans of mixtures of experts: what is held and sent, and that the trainer takes what the search finds."""

from argparse import Namespace
from dataclasses import replace

import pytest

from yoco_megatron.config.experts import layer_freq
from yoco_megatron.costs.card import H100
from yoco_megatron.costs.memory import gpu_memory
from yoco_megatron.costs.shape import ModelShape, parameter_count, routed_parameters
from yoco_megatron.costs.stage_time import held_parameters
from yoco_megatron.costs.traffic import routed_bytes
from yoco_megatron.planning import flags
from yoco_megatron.planning.mesh import Plan
from yoco_megatron.planning.report import search_report
from yoco_megatron.planning.search import search, settings

CONFIGS = ["--config", "configs/model/yoco_moe_3b.yaml", "configs/recipe/3b_1t.yaml", "--vocab-size", "100288"]


def parsed(*more: str, gpus: int = 16) -> tuple[Namespace, dict]:
    return flags.parse([*CONFIGS, "--global-batch-size", "256", *more], gpus)


def test_the_trainer_takes_what_the_search_finds():
    from yoco_megatron.config.yaml_files import to_argv
    from yoco_megatron.startup.arguments import parse_for_job
    from yoco_megatron.startup.parser import build_parser

    args, own = parsed("--context-parallel-size", "1", "--pipeline-model-parallel-size", "2")
    found = search(args, own, H100)
    best = found.best
    assert best.args.expert_model_parallel_size > 1 and f"EP{best.args.expert_model_parallel_size}" in best.mesh
    mock = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--save-interval", "10", "--global-batch-size", "256"]
    decided = to_argv(settings(best, args), build_parser())
    of_run, stages = parse_for_job([*CONFIGS, "--pipeline-model-parallel-size=2", *decided, *mock], 16)
    of_run.gradient_accumulation_fusion = True  # as on a GPU
    assert gpu_memory(of_run, stages.parts()).parts == pytest.approx(dict(best.memory.parts))
    assert "  experts" in search_report(found, settings(best, args), 4)


def test_ranks_share_experts_and_send_tokens():
    args, _ = parsed(*["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "4"])
    shape = ModelShape.from_args(args)
    whole, routed = sum(parameter_count(shape).values()), 25 * 64 * 3 * 3072 * 1024
    assert routed_parameters(shape) == routed
    (stage,) = Plan.of(args, H100).stages
    assert held_parameters(args, shape, stage) == pytest.approx(((whole - routed) / 2, routed / 8), rel=1e-6)
    # 6 experts of a token, 4,096 tokens of which a rank has half; 3 of 4 rows leave, and each comes from 2 ranks.
    args.micro_batch_size = 1
    each = 2048 * 6 * 3072 * 2 * (3 / 4 + 1)
    assert routed_bytes(args, shape, "cross_decoder", 1) == pytest.approx(2 * each)
    assert routed_bytes(args, shape, "self_decoder", 2) == pytest.approx(4 * each * 12 / 13)  # the first layer is dense
    args.expert_model_parallel_size = args.expert_tensor_parallel_size = 1
    assert routed_bytes(args, shape, "cross_decoder", 2) == 0


def test_time_of_experts_is_that_of_the_active_model_and_more():
    more = ["--micro-batch-size", "2", "--use-distributed-optimizer"]
    times = {ep: Plan.of(parsed(*more, "--expert-model-parallel-size", str(ep))[0], H100).time for ep in (1, 8)}
    plain = flags.parse(
        ["--config", "configs/model/yoco_3b.yaml", *CONFIGS[2:], *more, "--global-batch-size", "256"], 16
    )
    dense = Plan.of(plain[0], H100).time
    assert times[1].parts["experts"] == 0 < times[8].parts["experts"]
    assert dense.parts["compute"] < times[8].parts["compute"] < times[1].parts["compute"] < 2 * dense.parts["compute"]
    assert times[8].parts["host"] < times[1].parts["host"]  # fewer experts run one after the other
    assert "experts" not in dense.parts


def test_frequencies():
    assert layer_freq("2") == 2 and layer_freq("[0]+[1]*3") == [0, 1, 1, 1]
    assert layer_freq("([1]+[0]*2)*2") == layer_freq("[1,0,0,1,0,0]")
    malformed = ("__import__('os')", "[1", "[1]+2", "1.5", "[x]", "-1", "True")
    for wrong in (*malformed, "[1]*99999999999", "[1]*9999+[1]*9999", "-" * 100_000 + "1"):
        with pytest.raises(ValueError, match="--moe-layer-freq"):
            layer_freq(wrong)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--expert-model-parallel-size 5", "experts do not divide"),
        ("--fp8-format hybrid", "--fp8-format is not built for --num-experts"),
        ("--moe-layer-freq [1]*3", r"--moe-layer-freq \[1, 1, 1\] must be 0 or 1 for each of"),
    ],
)
def test_meshes_that_cannot_be(more, message):
    args, own = parsed(*more.split())
    with pytest.raises(ValueError, match=message):
        search(args, own, replace(H100))
