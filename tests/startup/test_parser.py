"""The command line and its configs: order, messages, and back as the resolved config."""

import pytest
import yaml

from yoco_megatron.config.yoco_fields import YOCOFields
from yoco_megatron.startup import arguments, checks, record
from yoco_megatron.startup.parser import build_parser

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2"
MINIMAL = [*SIZES.split(), "--mock-data"]


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
    with pytest.raises(ValueError, match=r"--init-law: invalid choice: 'flat' .*megatron"):
        arguments.parse([*MINIMAL, "--init-law", "flat"])


def test_yaml_cfg_is_refused():
    with pytest.raises(ValueError, match=r"--yaml-cfg .*--config"):
        arguments.parse([*MINIMAL, "--yaml-cfg", "missing.yaml"])


def test_the_help_of_flags_is_read_once(monkeypatch):
    build_parser()
    monkeypatch.setattr("megatron.training.argument_utils.ast.parse", None)
    assert "--num-layers" in build_parser()._option_string_actions


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
    ["--iterations-to-skip", "3", "5", "--global-batch-size", "8"],
    ["--tokenizer-type", "NullTokenizer", "--null-tokenizer-pad-id=-7"],
    ["--init-law", "megatron", "--init-method-std", "1e-5"],
    ["--no-scale-embedding", "--bf16", "--disable-bias-linear", "--untie-embeddings-and-output-weights"],
    ["--wandb-exp-name", "007", "--wandb-project", "yes", "--tensorboard-dir", "1e3", "--log-interval", "10"],
    ["--tokenizer-model", "null", "--lr-decay-style", "cosine", "--self-decoder", "sliding_window"],
    ["--recompute-granularity", "selective", "--recompute-modules", "core_attn", "layernorm"],
    ["--num-layers", "6", "--num-layers", "8"],
    ["--override-opt-param-scheduler", "--exit-signal", "SIGUSR1", "--exit-signal-handler"],
]


@pytest.mark.parametrize("flags", ROUND_TRIP, ids=" ".join)
def test_resolved_config_gives_the_same_arguments(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "check_files", lambda args: None)
    argv = [token for token in MINIMAL if token != "--mock-data" or "--data-path" not in flags]
    args = arguments.parse([*argv, *flags])
    path = record.save_resolved_config(args, str(tmp_path / "run"))
    again = arguments.parse(["--config", str(path)])
    first, second = vars(args), vars(again)
    assert first == second
    assert again.resolved_config == yaml.safe_load(path.read_text())


def test_resolved_config_holds_what_was_said_and_no_more(config, tmp_path):
    args = arguments.parse(["--config", config, *MINIMAL, "--hidden-size", "96", "--bf16"])
    path = record.save_resolved_config(args, str(tmp_path / "new" / "folder"))
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


def test_help_of_our_flags_alone(capsys):
    with pytest.raises(SystemExit) as done:
        build_parser().parse_args(["--help-yoco"])
    shown = capsys.readouterr().out
    assert done.value.code == 0
    assert all(flag in shown for flag in ("--self-decoder-window", "--run-folder", "--verbose", "--help-yoco"))
    assert "--num-layers" not in shown.replace("--num-layers.", "") and len(shown.splitlines()) < 250


def test_changed_lists_are_not_the_next_defaults():
    arguments.parse(MINIMAL).profile_ranks.append(1)
    assert arguments.parse(MINIMAL).profile_ranks == []
