"""Training mixtures of experts from the command line: meshes, checkpoints across them, export and back, refusals.

Runs share their processes (`support.cli.Runs`). Tolerances as in test_meshes.py.
"""

from pathlib import Path

import pytest
import torch
from convert.test_convert import entries, in_fresh_process, tensors
from support.cli import TINY, Runs, train

from yoco_megatron.convert import config_fields
from yoco_megatron.convert.readers import open_source
from yoco_megatron.startup import arguments

EXPERTS = (
    *("--num-experts", "4", "--moe-ffn-hidden-size", "32", "--moe-token-dispatcher-type", "alltoall"),
    *("--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", "0.1", "--moe-router-dtype", "fp32"),
)
KINDS = (
    *("--moe-layer-freq", "[1,0,1,1]", "--moe-shared-expert-intermediate-size", "16", "--moe-shared-expert-gate"),
    *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
)
FLAGS = (
    *TINY,
    *EXPERTS,
    *KINDS,
    "--micro-batch-size",
    "1",
    "--train-iters",
    "4",
    "--use-distributed-optimizer",
    "--eval-iters",
    "0",
)
EP2 = ("--expert-model-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
HALF = ("--ckpt-step", "2")


def test_checkpoints_at_other_expert_parallelism(tmp_path: Path) -> None:
    """Divided experts have an optimizer of their own, and are loaded where they are not divided, and back."""
    divided, whole = str(tmp_path / "divided"), str(tmp_path / "whole")
    save = ("--save-interval", "2", "--save")
    runs = Runs(
        2,
        {
            "EP2": [*FLAGS, *EP2, *save, divided],
            "DP2": [*FLAGS, *save, whole],
            "EP2 to DP2": [*FLAGS, "--load", divided, *HALF],
            "DP2 to EP2": [*FLAGS, *EP2, "--load", whole, *HALF],
            "EP2 to TP2": [*FLAGS, *TP2, "--load", divided, *HALF],
            "EP2 to TP2 ETP1": [*FLAGS, *TP2, "--expert-tensor-parallel-size", "1", "--load", divided, *HALF],
            "EP2 to CP2": [*FLAGS, "--context-parallel-size", "2", *EP2, "--load", divided, *HALF],
            "EP2 with a new rate": [
                *(*FLAGS, "--load", divided, *HALF, "--lr", "1e-4", "--override-opt_param-scheduler"),
            ],
        },
        timeout=480,
    )
    alone = train(1, *FLAGS)
    for name in ("EP2", "DP2"):
        for step in alone.losses:
            assert runs[name].loss(step) == pytest.approx(alone.loss(step), rel=2e-6), (name, step)
    for name in ("EP2 to DP2", "DP2 to EP2", "EP2 to TP2", "EP2 to TP2 ETP1", "EP2 to CP2"):
        log = runs[name]
        assert list(log.losses) == [3, 4], name
        for step in log.losses:
            assert log.loss(step) == pytest.approx(alone.loss(step), rel=1e-5), (name, step)
    assert runs["EP2 with a new rate"].loss(3) == pytest.approx(alone.loss(3), rel=1e-5)
    _goes_out_and_comes_back(Path(divided), tmp_path)
    assert " seq_load_balancing_loss " in alone.text and " load_balancing_loss" not in alone.text


def _goes_out_and_comes_back(run: Path, folder: Path) -> None:
    """Bit for bit, with all that a checkpoint of the trainer's has."""
    for kind, source, to in (("megatron", run, "hf"), ("hf", folder / "hf", "megatron")):
        assert "agree within" in in_fresh_process(kind, str(source), to, str(folder / to), shard_bytes=40_000)
    before, after = tensors(run), tensors(folder / "megatron")
    assert before.keys() == after.keys() and "decoder.layers.0.mlp.router.expert_bias" in before
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key
    assert entries(run) == entries(folder / "megatron")
    assert (run / "architecture.json").read_text() == (folder / "megatron/architecture.json").read_text()
    row = "| experts | 2 of 4 for each token, 32 wide, in 3 layers; one for all tokens, 16 wide |"
    assert row in (folder / "hf/README.md").read_text()
    with pytest.raises(ValueError, match="--to fla: its YOCOForCausalLM has no mixture of experts"):
        config_fields.to_fla(open_source("hf", str(folder / "hf")).config)
    config = folder / "hf/config.json"
    config.write_text(config.read_text().replace("scoring_func", "scoring_fun"))
    with pytest.raises(ValueError, match="lacks scoring_func"):
        open_source("hf", str(folder / "hf"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--moe-router-topk", "5"], "--moe-router-topk 5 must lie between 1 and --num-experts 4"),
        (["--moe-layer-freq", "[0]*3"], "must be 0 or 1 for each of --num-layers"),
        (["--moe-layer-freq", "0"], "--moe-layer-freq 0 must be at least 1"),
        (["--expert-model-parallel-size", "2"], "1 processes cannot be divided into"),
        (["--moe-router-load-balancing-type", "sinkhorn"], "depend on later tokens"),
        (["--moe-router-load-balancing-type", "global_aux_loss"], "number of data-parallel ranks"),
        (["--moe-expert-capacity-factor", "1.0"], "depends on later ones"),
        (["--moe-grouped-gemm"], "--moe-grouped-gemm is refused"),
        (["--moe-token-dispatcher-type", "flex"], "use allgather or alltoall"),
        (["--calculate-per-token-loss"], "--calculate-per-token-loss does not go with --moe-aux-loss-coeff"),
        (["--mlp-chunks-for-training", "2"], "--mlp-chunks-for-training is not built for --num-experts"),
        (["--recompute-elementwise"], "--recompute-elementwise is not built for --num-experts"),
        (["--fp8-format", "hybrid"], "--fp8-format is not built for --num-experts"),
        (["--teacher", "somewhere"], "--teacher is not built for --num-experts"),
        (["--moe-router-load-balancing-type", "aux_loss", "seq_aux_loss"], "has 2 values, --moe-aux-loss-coeff 1"),
    ],
)
def test_what_is_refused(given: list[str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        arguments.parse([*TINY, *EXPERTS, *given])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_experts_alone_have_flags_of_experts() -> None:
    with pytest.raises(ValueError, match="--moe-router-topk has no effect without --num-experts"):
        arguments.parse([*TINY, "--moe-router-topk", "1"])
    with pytest.raises(ValueError, match="--expert-model-parallel-size has no effect without --num-experts"):
        arguments.parse([*TINY, "--expert-model-parallel-size", "2"], 2)
    with pytest.raises(ValueError, match="--num-experts 4 is not a multiple of --expert-model-parallel-size 3"):
        arguments.parse([*TINY, *EXPERTS, "--expert-model-parallel-size", "3", "--global-batch-size", "6"], 3)
    with pytest.raises(ValueError, match="needs --sequence-parallel"):
        arguments.parse([*TINY, *EXPERTS, "--tensor-model-parallel-size", "2"], 2)
