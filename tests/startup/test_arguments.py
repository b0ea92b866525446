"""From command line and configs to Megatron's arguments: order, defaults, messages, and back as the resolved config."""

import pytest
import torch
import yaml
from megatron.training.argument_utils import core_transformer_config_from_args

from yoco_megatron.config.yoco_fields import YOCOFields
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.startup import arguments

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2"
MINIMAL = [*SIZES.split(), "--mock-data"]


@pytest.fixture(autouse=True)
def world(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("num-layers: 8\nhidden-size: 128\nlr: 1.0e-3\n")
    return str(path)


def test_the_command_line_wins_over_configs(config):
    args = arguments.parse([*MINIMAL, "--config", config])
    assert (args.num_layers, args.hidden_size, args.lr) == (4, 64, 1e-3)  # wherever --config stands
    args = arguments.parse(["--config", config, "num-layers=6", *MINIMAL[4:]])
    assert (args.num_layers, args.hidden_size) == (6, 128)


def test_several_config_flags_add_up(config):
    args = arguments.parse(["--config", config, "--config", "hidden-size=32", *MINIMAL[4:]])
    assert (args.num_layers, args.hidden_size) == (8, 32)


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


def test_checkpoints_load_at_any_mesh_by_default():
    args = arguments.parse(MINIMAL)
    assert args.ckpt_format == "torch_dist" and args.dist_ckpt_optim_fully_reshardable


def test_a_users_value_wins_over_our_defaults():
    args = arguments.parse([*MINIMAL, "--norm-epsilon", "1e-6", "--hidden-dropout", "0.1"])
    assert (args.layernorm_epsilon, args.hidden_dropout) == (1e-6, 0.1)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--hiden-size", "--hidden-size"),
        ("--self-decoder-windw", "--self-decoder-window"),
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--num-layer", "--num-layers"),  # no silent abbreviations
    ],
)
def test_unknown_flag_names_the_nearest(flag, meant):
    with pytest.raises(ValueError, match=f"unrecognized arguments: {flag} 4; did you mean {meant}\\?"):
        arguments.parse([*MINIMAL, flag, "4"])


def test_wrong_type_and_choice_name_the_flag():
    with pytest.raises(ValueError, match="--hidden-size: invalid int value: 'wide'"):
        arguments.parse([*MINIMAL, "--hidden-size", "wide"])
    with pytest.raises(ValueError, match=r"--self-decoder: invalid choice: 'mamba' .*gated_retention"):
        arguments.parse([*MINIMAL, "--self-decoder", "mamba"])


def test_yaml_cfg_is_refused():
    with pytest.raises(ValueError, match=r"--yaml-cfg .*--config"):
        arguments.parse([*MINIMAL, "--yaml-cfg", "missing.yaml"])


def test_an_assertion_of_megatron_is_quoted():
    """Most of Megatron's checks are assertions without a message: the condition is then shown."""
    args = arguments.parse([*MINIMAL, "--train-iters", "2", "--lr", "1e-4", "--min-lr", "1e-3"])
    with pytest.raises(ValueError, match=r"assert args\.min_lr <= args\.lr"):
        arguments.finalize(args)


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


def test_the_help_of_flags_is_read_once(monkeypatch):
    arguments.build_parser()
    monkeypatch.setattr("megatron.training.argument_utils.ast.parse", None)
    assert "--num-layers" in arguments.build_parser()._option_string_actions


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


def test_transformer_engine_that_is_not_there():
    from yoco_megatron import runtime

    if runtime.has_transformer_engine():
        pytest.skip("it is there")
    args = arguments.parse([*MINIMAL, "--transformer-impl", "transformer_engine"])  # as a login node does
    with pytest.raises(ValueError, match=r"--transformer-impl transformer_engine: .*doctor"):
        arguments.check_machine(args)


def test_a_run_with_cuda_graphs_is_read_without_a_gpu(tmp_path):
    from yoco_megatron.startup.load_run import parse_run

    flags = ["--cuda-graph-impl", "full_iteration", "--no-check-for-nan-in-loss-and-grad"]
    arguments.save_resolved_config(arguments.parse([*MINIMAL, *flags]), tmp_path)
    assert parse_run(tmp_path).cuda_graph_impl == "none"


def test_help_has_our_group(capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: pretrain_yoco.py")
    group = text.split("\nYOCO:\n")[1].split("\n\n")
    ours = "\n\n".join(group[:2])
    for name in YOCOFields.__dataclass_fields__:
        assert f"--{'no-' if name == 'scale_embedding' else ''}{name.replace('_', '-')}" in ours, name
    assert "--config FILE" in ours
    assert "--tensor-model-parallel-size" in text  # and Megatron's are all there


ROUND_TRIP = [
    [],
    ["--lr", "1e-5", "--min-lr", "1.5E-6", "--weight-decay", "0.05"],
    ["--hidden-size=128", "--norm-epsilon=1e-6"],
    ["--data-path", "0.3", "a_text", "0.7", "b text", "--split", "90,5,5"],
    ["--rampup-batch-size", "2", "2", "100", "--global-batch-size", "8"],
    ["--init-method-std=-1e-5", "--embedding-init-method-std", "-1.5"],
    ["--no-scale-embedding", "--bf16", "--disable-bias-linear", "--untie-embeddings-and-output-weights"],
    ["--wandb-exp-name", "007", "--wandb-project", "yes", "--tensorboard-dir", "1e3", "--log-interval", "10"],
    ["--tokenizer-model", "null", "--lr-decay-style", "cosine", "--self-decoder", "sliding_window"],
    ["--recompute-granularity", "selective", "--recompute-modules", "core_attn", "layernorm"],
    ["--num-layers", "6", "--num-layers", "8"],
    ["--override-opt-param-scheduler", "--exit-signal", "SIGUSR1", "--exit-signal-handler"],
]


@pytest.mark.parametrize("flags", ROUND_TRIP, ids=" ".join)
def test_resolved_config_gives_the_same_arguments(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "check_data_prefixes", lambda prefixes: None)
    monkeypatch.setattr(arguments, "check_split", lambda prefixes, split: None)
    argv = [token for token in MINIMAL if token != "--mock-data" or "--data-path" not in flags]
    args = arguments.parse([*argv, *flags])
    path = arguments.save_resolved_config(args, str(tmp_path / "run"))
    again = arguments.parse(["--config", str(path)])
    first, second = vars(args), vars(again)
    assert first == second
    assert again.resolved_config == yaml.safe_load(path.read_text())


def test_resolved_config_holds_what_was_said_and_no_more(config, tmp_path):
    args = arguments.parse(["--config", config, *MINIMAL, "--hidden-size", "96", "--bf16"])
    path = arguments.save_resolved_config(args, str(tmp_path / "new" / "folder"))
    assert yaml.safe_load(path.read_text()) == {
        "num-layers": 4,
        "hidden-size": 96,
        "lr": 0.001,
        "num-attention-heads": 4,
        "seq-length": 64,
        "micro-batch-size": 2,
        "mock-data": True,
        "bf16": True,
    }
    assert list(path.parent.iterdir()) == [path]  # nothing half-written is left
