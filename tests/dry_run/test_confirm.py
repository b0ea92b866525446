"""The real trainer as ranks of a world that does not exist: right meshes are confirmed, wrong ones named."""

import os
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from unittest import mock

import pytest
from support.cli import TINY, TINY_BASELINE, TINY_WINDOWS
from support.worlds import spawn

from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.costs.traffic import routed_bytes
from yoco_megatron.dry_run import gpu
from yoco_megatron.dry_run.checks import mismatched_calls, off_the_formulas, uncovered
from yoco_megatron.dry_run.confirm import NO_FILES, Confirmed, confirm
from yoco_megatron.dry_run.fake_rank import STEP
from yoco_megatron.dry_run.ledger import Call, Ledger
from yoco_megatron.dry_run.mesh import Mesh, Place
from yoco_megatron.dry_run.report import report
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.startup.arguments import parse_for_job
from yoco_megatron.utils.ports import free_port

EXECUTION = ["--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
FLAGS = [*TINY, *EXECUTION]
TP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PP = ["--pipeline-model-parallel-size", "2"]


def _confirm(entry, flags: list[str], world_size: int) -> Confirmed:
    return confirm(entry, flags, world_size, jobs=2)


def _main(argv: list[str]) -> None:
    import pretrain_yoco

    pretrain_yoco.main(argv)


def _without_an_all_reduce_on_rank_1(argv: list[str]) -> None:
    skipped = "megatron.core.distributed.finalize_model_grads._allreduce_non_tensor_model_parallel_grads"
    module, name = skipped.rsplit(".", 1)
    is_broken = mock.patch.object(import_module(module), name) if os.environ["RANK"] == "1" else nullcontext()
    with is_broken:
        _main(argv)


def _ledger_of_a_real_run(argv: list[str]) -> list[Call]:
    """Of the first step."""
    from megatron.training import training

    ledger, step = Ledger(), training.train_step

    class Done(BaseException):
        pass

    def train_step(*args, **kwargs):
        with ledger:
            ledger.phase = STEP
            step(*args, **kwargs)
        raise Done

    with mock.patch.object(training, "train_step", train_step), pytest.raises(Done):
        _main(argv)
    return ledger.calls


# Stages: the embedding and a layer of the self-decoder; another and the shared K,V; the cross-decoder; and the head.
MESH = [
    *(*FLAGS, *TP, "--pipeline-model-parallel-size", "4", "--context-parallel-size", "2", "--shared-kv-sets", "2"),
    *("--global-batch-size", "256", "--use-precision-aware-optimizer"),
]


@pytest.fixture(scope="module")
def of_1024() -> Confirmed:
    return spawn(_confirm, 1, (_main, MESH, 1024))[0]


def _parsed() -> tuple[Namespace, StagePlan | None]:
    with gpu.defaults():
        return parse_for_job([*MESH, *NO_FILES], 1024)


def test_right_mesh_is_confirmed(of_1024):
    assert of_1024.problems == []
    assert [record.rank for record in of_1024.records[:6]] == [0, 1, 2, 252, 256, 257]
    assert "16 of 1024 ranks ran a step" in report(of_1024)


def test_skipped_collective_names_ranks_and_call():
    found = spawn(_confirm, 1, (_without_an_all_reduce_on_rank_1, [*FLAGS, *TP], 2))[0]
    (problem,) = found.problems
    assert problem.startswith("ranks 0 and 1 differ in number ")
    assert ": allreduce of " in problem and "(float32) among ranks 0, 1 in the step against " in problem


def test_states_and_flops_are_held_against_the_formulas(of_1024):
    args, plan = _parsed()
    first = of_1024.records[0]

    def problems(**changes) -> list[str]:
        record = replace(first, **changes)
        return list(off_the_formulas([record], of_1024.mesh, args, ModelShape.from_args(args), plan.parts()))

    assert problems() == []
    assert problems(flops=first.flops | {"products": first.flops["products"] * 1.05})[0].startswith("rank 0 has ")
    states = first.state_bytes | {"optimizer": first.state_bytes["optimizer"] + 10_000}
    assert "bytes of optimizer, the formulas say" in problems(state_bytes=states)[0]


def test_norms_of_queries_and_keys_and_biases():
    more = ["--self-decoder", "sliding_window", "--qk-layernorm", "--add-qkv-bias"]
    assert spawn(_confirm, 1, (_main, [*FLAGS, *TP, *more], 2))[0].problems == []


def test_packed_documents():
    more = [*TINY_WINDOWS, "--context-parallel-size", "2", "--dataloader-inter-document-masking"]
    found = spawn(_confirm, 1, (_main, [*FLAGS, *TP, *more], 4))[0]
    assert found.problems == []
    assert any(call.name.startswith("alltoall") for call in found.records[0].calls)  # halos, as far as documents reach


def test_a_mixer_for_each_layer():
    more = ["--self-decoder-pattern", "GS", "--context-parallel-size", "2"]
    assert spawn(_confirm, 1, (_main, [*FLAGS, *TP, *more], 4))[0].problems == []


EXPERTS = [  # in half of the layers
    *(*FLAGS, "--num-experts", "4", "--moe-layer-freq", "[0,1,1,0]", "--moe-ffn-hidden-size", "32"),
    *("--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "0.1", "--moe-router-dtype", "fp32"),
    *("--expert-model-parallel-size", "2"),
]
ALL_TO_ALL = ["--moe-token-dispatcher-type", "alltoall"]
OF_16 = [*EXPERTS, *ALL_TO_ALL, *TP, *PP, "--moe-shared-expert-intermediate-size", "16", "--global-batch-size", "16"]


@pytest.fixture(scope="module")
def of_experts() -> Confirmed:
    """Two ranks share an expert, two such pairs all experts."""
    return spawn(_confirm, 1, (_main, OF_16, 16))[0]


def test_experts_are_confirmed(of_experts):
    assert of_experts.problems == []
    assert [record.rank for record in of_experts.records] == [0, 1, 2, 6, 8, 9, 10, 14]
    kinds = {(0, 1): "tp", (0, 2): "ep", (0, 4): "edp", (0, 2, 4, 6): "dp", (0, 1, 2, 3): "etp+ep"}
    assert {group: of_experts.mesh.kind(group) for group in kinds} == kinds


def test_experts_send_what_the_formula_says(of_experts):
    with gpu.defaults():
        args, _ = parse_for_job([*OF_16, *NO_FILES], 16)
    calls = [call for call in of_experts.records[0].calls if call.group == (0, 2) and call.dtype == "bfloat16"]
    sent = [call.bytes for call in calls if call.phase == STEP and call.name.startswith("alltoall")]
    args.expert_tensor_parallel_size = 1  # the formula has what the ranks that share an expert send, too
    of_a_layer = routed_bytes(args, ModelShape.from_args(args).of_layers([1]), "self_decoder", 2)
    others = (2 - 1) / 2  # of two ranks
    assert sum(sent) * others == 2 * of_a_layer  # two micro-batches
    assert len(set(sent)) == 1


def test_an_expert_that_nobody_writes_is_found(of_experts):
    records = of_experts.records
    expert = next(shard for shard in records[2].shards if ".mlp.experts." in shard.key)
    without = replace(records[2], shards=tuple(shard for shard in records[2].shards if shard.key != expert.key))
    (problem,) = uncovered([*records[:2], without, *records[3:]], of_experts.mesh)
    assert problem.startswith("no rank would write some of the ") and expert.key in problem


def test_a_part_of_a_tensor_that_nobody_writes_is_found(of_experts):
    """The last expert rank has one part less of what is in several parts on each."""
    records = of_experts.records
    keys = [shard.key for shard in records[2].shards if ".mlp.experts." in shard.key]
    key = next(key for key in keys if keys.count(key) > 1)
    lost = max((shard for shard in records[2].shards if shard.key == key), key=lambda shard: shard.offset)
    without = replace(records[2], shards=tuple(shard for shard in records[2].shards if shard != lost))
    assert any(key in problem for problem in uncovered([*records[:2], without, *records[3:]], of_experts.mesh))


def test_experts_of_gathered_tokens_are_confirmed():
    assert spawn(_confirm, 1, (_main, EXPERTS, 2))[0].problems == []


@pytest.fixture(scope="module")
def of_travelling_queries() -> Confirmed:
    """All-to-all in which each rank receives its own number of rows; fewer queries than keys."""
    flags = ["--context-parallel-size", "2", "--loss-suffix", "8", "--cp-cross-attention", "queries"]
    return spawn(_confirm, 1, (_main, [*FLAGS, *flags], 2))[0]


def test_queries_travel_between_ranks(of_travelling_queries):
    assert of_travelling_queries.problems == []


def test_states_are_those_of_bf16_and_a_sharded_optimizer(of_travelling_queries):
    for record in of_travelling_queries.records:
        # Context parallelism divides the optimizer, too; Megatron pads buffers.
        bytes_per_parameter = [size / record.parameters for size in record.state_bytes.values()]
        assert bytes_per_parameter == pytest.approx([2, 4, 12 / 2], rel=0.02)


WINDOWS = [*TINY, *TINY_WINDOWS]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules"]
FULL = ["--recompute-granularity", "full", "--recompute-num-layers", "1", "--recompute-method"]


@pytest.mark.parametrize(
    "flags",
    [
        [*WINDOWS, *SELECTIVE, "mlp", "core_attn"],
        [*WINDOWS, *FULL, "block", "--keep-cross-attention"],
        [*WINDOWS, *FULL, "uniform", "--loss-chunk-size", "16", "--mlp-chunks-for-training", "2"],
        [*TINY_BASELINE, *FULL, "block"],
        [*TINY, *FULL, "uniform", "--self-decoder-pattern", "RS", "--cross-decoder-pattern", "GA"],
    ],
    ids=["selective", "block", "uniform", "GPT", "memory units"],
)
def test_flops_of_attention_and_recompute_are_those_of_the_formulas(flags):
    found = spawn(_confirm, 1, (_main, [*EXECUTION, *flags], 1))[0]
    assert found.problems == []
    assert found.records[0].flops["attention"] > 0


def test_optimizer_is_in_the_checkpoint(of_1024):
    keys = {shard.key for record in of_1024.records for shard in record.shards}
    assert {key.split("module.")[0] for key in keys if key.endswith("embedding.word_embeddings.weight")} == {
        *("", "optimizer.state.param.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."),
    }


def test_lost_or_larger_message_is_found(of_1024):
    sender, *others = of_1024.records
    sends = [index for index, call in enumerate(sender.calls) if call.name == "send"]
    lost = replace(sender, calls=sender.calls[: sends[-1]] + sender.calls[sends[-1] + 1 :])
    assert [text[:38] for text in mismatched_calls([lost, *others])] == ["ranks 0 and 256 differ in number 2 of "]
    calls = list(sender.calls)
    calls[sends[0]] = replace(calls[sends[0]], bytes=1)
    (problem,) = mismatched_calls([replace(sender, calls=tuple(calls)), *others])
    assert "number 1 of their sends: send of 1 bytes" in problem


def test_checkpoint_must_cover_each_tensor_once(of_1024):
    first, *others = of_1024.records
    shard = next(shard for shard in first.shards if shard.size != shard.shape)
    without = replace(first, shards=tuple(one for one in first.shards if one != shard))
    assert list(uncovered(of_1024.records, of_1024.mesh)) == []
    assert all(shard.key in text for text in uncovered([without, *others], of_1024.mesh))
    assert "no rank would write" in next(uncovered([without, *others], of_1024.mesh))
    twice = replace(first, shards=(*first.shards, shard))
    assert "several ranks would write" in next(uncovered([twice, *others], of_1024.mesh))


def test_ledger_is_that_of_a_real_run():
    flags = [*EXPERTS, *ALL_TO_ALL, *TP, *PP, "--expert-tensor-parallel-size", "1"]
    fake = spawn(_confirm, 1, (_main, flags, 4))[0]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    real = spawn(_ledger_of_a_real_run, 4, ([*flags, "--num-workers", "0"],), env=env)
    assert fake.problems == []
    for record, calls in zip(fake.records, real, strict=True):
        # How many tokens an expert gets is the router's to say.
        assert [_sized(call) for call in record.calls if call.phase == STEP] == [_sized(call) for call in calls]


def _sized(call: Call) -> Call:
    return replace(call, bytes=0) if call.name.startswith("alltoall") else call


def test_ranks_of_a_large_mesh():
    mesh = Mesh(Place(tp=8, cp=4, dp=64, pp=4))
    assert all(mesh.rank(mesh.place(rank)) == rank for rank in range(0, len(mesh), 37))
    middle = {"cross_decoder": 2}
    ranks = mesh.distinct_ranks([{"embedding": 1}, middle, middle, {"output_layer": 1}])
    assert [str(mesh.place(rank)) for rank in ranks[:4]] == [
        "TP0 CP0 DP0 PP0",
        "TP7 CP0 DP0 PP0",
        "TP0 CP3 DP0 PP0",
        "TP0 CP0 DP63 PP0",
    ]
    assert len(ranks) == 4 + 4 + 2 + 4
    assert mesh.kind((0, 8, 16)) == "cp" and mesh.kind(range(len(mesh))) == "world"


def test_flags_of_files_are_refused():
    with pytest.raises(ValueError, match="--jobs 0 must be at least 1"):
        confirm(_main, FLAGS, 4, jobs=0)
    with pytest.raises(ValueError, match="--save: a dry run reads and writes no files"):
        confirm(_main, [*TINY, "--save", "somewhere"], 2)


# A hidden state is 7% of a layer. Two tensor-parallel ranks store about one of theirs more than the formula.
@pytest.mark.parametrize(("mesh", "tolerance"), [([], 0.02), (TP, 0.08)])
def test_layer_of_multi_token_prediction_stores_what_its_formula_says(mesh, tolerance):
    sizes = ["--hidden-size", "512", "--ffn-hidden-size", "512", "--seq-length", "2048", "--loss-chunk-size", "512"]
    one, two = (
        spawn(_confirm, 1, (_main, [*FLAGS, *sizes, *mesh, "--mtp-num-layers", layers], 2))[0] for layers in ("1", "2")
    )
    assert one.problems == two.problems == []

    def stored(confirmed: Confirmed) -> int:
        record = confirmed.records[0]
        return record.peak_bytes - sum(record.state_bytes.values())

    formula = two.memories[0].activations - one.memories[0].activations
    assert formula == pytest.approx(stored(two) - stored(one), rel=tolerance)
