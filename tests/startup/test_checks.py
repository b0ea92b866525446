"""What checks find in arguments, which they leave as they are. Most mistakes are in tests/test_bad_input.py."""

import contextlib
import copy

import pytest
import torch
from support.cli import parsed

from yoco_megatron import runtime
from yoco_megatron.resilience import arguments as resilience
from yoco_megatron.startup import arguments, checks, defaults, packages, record
from yoco_megatron.startup.load_run import parse_run
from yoco_megatron.startup.parser import build_parser, parse_flags

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2"
MINIMAL = [*SIZES.split(), "--mock-data", "--train-iters", "9", "--lr", "1e-3"]


def test_checks_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = ["--run-folder", str(tmp_path / "run"), "--guard-sigmas", "5", "--load", str(tmp_path), "--no-load-optim"]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    run += ["--pipeline-model-parallel-size", "2", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    parser = build_parser()
    args = parse_flags([*MINIMAL, *run], parser)
    defaults.fill_in_defaults(args)
    before = copy.deepcopy(vars(args))
    resilience.check(args)
    checks.check_flags(args, parser)
    checks.check_files(args)
    checks.check_training(args)
    checks.check_machine(args)
    assert vars(args) == before
    assert [path.name for path in tmp_path.iterdir()] == ["latest_checkpointed_iteration.txt"]


def test_transformer_engine_that_is_not_there():
    if runtime.has_transformer_engine():
        pytest.skip("it is there")
    args = arguments.parse([*MINIMAL, "--transformer-impl", "transformer_engine"])  # as a login node does
    with pytest.raises(ValueError, match=r"--transformer-impl transformer_engine: .*doctor"):
        checks.check_machine(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save", "s3://bucket/run"], "--save s3://bucket/run: .* mount the storage"),
        (["--pretrained-checkpoint", "msc://bucket/run"], "--pretrained-checkpoint msc://bucket/run: .* mount"),
        (["--optimizer", "sgd", "--use-distributed-optimizer"], "--optimizer sgd does not go with"),
        (["--use-precision-aware-optimizer"], "is built for --optimizer adam with --use-distributed-optimizer"),
        (
            ["--loss-suffix", "8", "--cp-cross-attention", "queries", "--deterministic-mode"],
            "--deterministic-mode: use auto",
        ),
        (["--cp-cross-attention", "queries"], "has no effect without --loss-suffix"),
        (
            ["--loss-suffix", "8", "--cp-cross-attention", "queries", "--cross-decoder-positions", "all"],
            "does not go with --cross-decoder-positions all",
        ),
        (["--optimizer", "muon", "--fp16"], "--fp16 is not built for --optimizer muon"),
        (["--optimizer", "muon", "--use-distributed-optimizer"], "is built for --bf16 alone"),
        (["--optimizer", "muon", "--muon-num-ns-steps", "0"], "--muon-num-ns-steps 0 must be at least 1"),
        (["--optimizer", "muon", "--muon-coefficient-type", "custom"], "the package has no other"),
        (["--optimizer", "soap"], "--optimizer soap: .*which checkpoints need"),
        (["--profile", "--use-pytorch-profiler"], "--profile writes beside --tensorboard-dir"),
        (
            ["--profile", "--use-pytorch-profiler", "--tensorboard-dir", "t", "--profile-step-start", "12"],
            "--profile-step-start 12 must be below --profile-step-end 12",
        ),
    ],
)
def test_flags_alone(flags, message):
    with pytest.raises(ValueError, match=message):
        arguments.parse([*MINIMAL, *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer muon", "--optimizer muon needs the package emerging-optimizers"),
        ("--optimizer lion", "--optimizer lion needs the package emerging-optimizers"),
        ("--fault-injector-num-ranks 1", "--fault-injector-num-ranks needs the package nvidia-resiliency-ext"),
        ("--wandb-project p", "--wandb-project p needs the package wandb, .*: pip install wandb"),
        ("--tensorboard-dir t", "--tensorboard-dir t needs the package tensorboard"),
        ("--save s --non-persistent-ckpt-type local", "local needs the package nvidia-resiliency-ext"),
    ],
)
def test_packages_that_are_not_there(flags, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args = build_parser().parse_args(flags.split())
    with pytest.raises(ValueError, match=message):
        packages.check(args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], ""),
        (["--hidden-size", "100000000000"], "the weights of one process take"),
        (["--num-layers", "2000000000"], "the weights of one process take"),
        (["--padded-vocab-size", "10000000000000"], "the weights of one process take"),
        (["--seq-length", "1000000000000"], "the hidden states of one layer of one process take"),
    ],
)
def test_sizes_that_no_memory_holds(flags, message):
    args = parsed(1, *flags)
    args.params_dtype = torch.float32
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        checks.check_fits(args)


def test_packages_that_are_there(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "there")
    packages.check(build_parser().parse_args(["--optimizer", "muon", "--log-straggler"]))


def test_a_run_with_cuda_graphs_is_read_without_a_gpu(tmp_path):
    flags = ["--cuda-graph-impl", "full_iteration", "--no-check-for-nan-in-loss-and-grad"]
    record.save_resolved_config(arguments.parse([*MINIMAL, *flags]), tmp_path)
    assert parse_run(tmp_path).cuda_graph_impl == "none"
