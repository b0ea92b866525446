"""What the flags leave open, and what is turned off because it helps nothing."""

import pytest
import torch
from megatron.training.argument_utils import core_transformer_config_from_args

from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.startup import arguments, defaults

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2"
MINIMAL = [*SIZES.split(), "--mock-data"]


def test_defaults_are_the_papers():
    args = arguments.parse(MINIMAL)
    args.params_dtype = torch.float32
    config = core_transformer_config_from_args(args, YOCOConfig)
    assert config.normalization == "RMSNorm" and config.layernorm_epsilon == 1e-5
    assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu
    assert not config.add_bias_linear and not config.add_qkv_bias and not config.qk_layernorm
    assert config.hidden_dropout == config.attention_dropout == 0.0
    assert config.self_decoder == "gated_retention" and config.num_self_decoder_layers == 2
    assert config.self_decoder_heads == config.self_decoder_query_groups == config.num_attention_heads
    assert config.self_decoder_window == 1024 and config.decay_temperature == 16.0
    assert config.rope_variant == "yoco" and config.rotary_interleaved and args.rotary_base == 10000
    assert config.scale_embedding and config.init_law == "yoco"
    assert not config.perform_initialization  # parameters are drawn by model/init.py


def test_a_vocabulary_without_padding():
    flags = [*MINIMAL, "--tokenizer-type", "NullTokenizer", "--vocab-size", "300"]
    for more, rows in (([], 384), (["--no-pad-vocab-size"], 300)):
        args = arguments.parse([*flags, *more])
        defaults.fill_in_padded_vocab_size(args)
        assert args.padded_vocab_size == rows


def test_checkpoints_load_at_any_mesh_by_default():
    args = arguments.parse(MINIMAL)
    assert args.ckpt_format == "torch_dist" and args.dist_ckpt_optim_fully_reshardable


def test_a_users_value_wins_over_our_defaults():
    args = arguments.parse([*MINIMAL, "--norm-epsilon", "1e-6", "--hidden-dropout", "0.1"])
    assert (args.layernorm_epsilon, args.hidden_dropout) == (1e-6, 0.1)


@pytest.mark.parametrize(
    ("processes", "mesh", "overlaps"),
    [
        (1, [], False),
        (2, [], True),
        (2, ["--context-parallel-size", "2"], True),
        (2, ["--tensor-model-parallel-size", "2"], False),
    ],
)
def test_overlap_needs_another_rank(processes, mesh, overlaps, monkeypatch):
    """Context-parallel ranks share the optimizer, too."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(arguments, "validate_args", lambda args: None)
    monkeypatch.setattr(arguments, "set_global_variables", lambda args: None)
    flags = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    args = arguments.finalize(arguments.parse([*MINIMAL, *mesh, *flags]))
    assert args.overlap_grad_reduce == args.overlap_param_gather == overlaps


@pytest.mark.parametrize(("more", "fused"), [([], False), (["--hidden-dropout", "0.1"], True)])
def test_the_host_neither_waits_nor_compiles_for_nothing(more, fused, monkeypatch):
    monkeypatch.setattr(arguments, "validate_args", lambda args: None)
    monkeypatch.setattr(arguments, "set_global_variables", lambda args: None)
    args = arguments.parse([*MINIMAL, *more])
    args.bias_dropout_fusion = True  # as on a GPU
    args = arguments.finalize(args)
    args.params_dtype = torch.float32
    config = core_transformer_config_from_args(args, YOCOConfig)
    assert not config.batch_p2p_sync
    assert config.bias_dropout_fusion == fused


def test_an_evaluation_adds_no_points_to_the_trainings_curves(tmp_path):
    run = ["--run-folder", str(tmp_path), "--load", str(tmp_path)]
    assert arguments.parse([*MINIMAL, *run]).tensorboard_dir == str(tmp_path / "tensorboard")
    assert arguments.parse([*MINIMAL, *run, "--skip-train"]).tensorboard_dir is None


@pytest.mark.parametrize(
    ("flags", "balanced"),
    [
        ("", False),
        ("--moe-router-load-balancing-type none --moe-aux-loss-coeff 0.01", False),
        ("--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.01", True),
        ("--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0 0.01", True),
        ("--moe-router-score-function sigmoid --moe-router-enable-expert-bias", True),
    ],
)
def test_experts_that_nothing_balances(flags, balanced, capsys):
    args = arguments.parse([*MINIMAL, "--num-experts", "4", "--moe-router-topk", "2", *flags.split()])
    defaults.warn_of_unbalanced_experts(args)
    assert ("nothing balances" in capsys.readouterr().out) is not balanced
