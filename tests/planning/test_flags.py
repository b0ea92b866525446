"""The flags that plans read, against Megatron's parser."""

import argparse
from dataclasses import fields

import pytest

from yoco_megatron import runtime
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.planning import flags
from yoco_megatron.startup.parser import build_parser

MODEL = ["--config", "configs/model/yoco_tiny.yaml", "--vocab-size", "255"]
MODEL += ["--micro-batch-size", "1", "--global-batch-size", "8"]


def test_names_types_and_defaults_are_megatrons():
    megatrons = build_parser()
    read = [action for action in flags.build_parser()._actions if action.default is not argparse.SUPPRESS]
    assert len(read) > 50
    for action in read:
        theirs = megatrons._option_string_actions[action.option_strings[0]]
        assert (action.dest, action.nargs == 0) == (theirs.dest, theirs.nargs == 0)
        if action.dest not in runtime.argument_defaults():  # of a machine without a GPU
            assert action.default == megatrons.get_default(action.dest)
        if action.choices:
            assert set(action.choices) == set(theirs.choices)
        if action.nargs != 0 and action.nargs != "+":
            assert action.type in (theirs.type, str)


def test_flags_without_effect_are_taken_and_unknown_ones_refused():
    no_effect = ["--lr", "1e-4", "--mock-data", "--data-path", "0.5", "a", "0.5", "b", "--save-interval", "9"]
    args, own = flags.parse([*MODEL, *no_effect, "--exp-avg-dtype", "fp32"], gpus=1)
    assert args.padded_vocab_size == 256
    assert own["vocab_size"] == 255 and "num_layers" not in own
    with pytest.raises(
        ValueError, match="unrecognized arguments: --tensor-parallel-size 2; did you mean --tensor-model-"
    ):
        flags.parse([*MODEL, "--tensor-parallel-size", "2"], gpus=2)
    with pytest.raises(ValueError, match="invalid int value: 'two'"):
        flags.parse([*MODEL, "--num-layers", "two"], gpus=2)
    with pytest.raises(ValueError, match="--global-batch-size is missing"):
        flags.parse(MODEL[:-2], gpus=1)


def test_all_sizes_of_a_model_are_read():
    made = {"padded_vocab_size", "tied", "num_queries", "means_over"}  # of other flags
    sizes = {field.name for field in fields(ModelShape)}
    assert sizes - made <= {action.dest for action in flags.build_parser()._actions}


def test_a_pattern_of_mixers_is_read_as_in_training():
    assert flags.parse([*MODEL, "--self-decoder-pattern", "RS"], gpus=1)[0].self_decoder == "RS"
    args, own = flags.parse([*MODEL, "--self-decoder", "gated_retention", "sliding_window"], gpus=1)
    assert args.self_decoder == own["self_decoder"] == "RS"


def test_config_then_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("bf16: true\nmicro-batch-size: 4\nrecompute-granularity: full\n")
    later = tmp_path / "later.yaml"
    later.write_text("recompute-granularity: null\n")
    argv = ["--config", MODEL[1], str(config), str(later), *MODEL[2:]]
    args, own = flags.parse(argv, gpus=1)
    assert (args.bf16, args.micro_batch_size, args.recompute_granularity) == (True, 1, None)
    assert own.keys() == {"vocab_size", "micro_batch_size", "global_batch_size"}
    assert isinstance(args, argparse.Namespace)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--tensor-model-parallel-size 0", "--tensor-model-parallel-size 0 must be at least 1"),
        ("--make-vocab-size-divisible-by 0", "--make-vocab-size-divisible-by 0 must be at least 1"),
        ("--context-parallel-size -1", "--context-parallel-size -1 must be at least 1"),
        ("--fp8-format e5m2", "invalid choice: 'e5m2'"),
        ("--architecture yolo", "invalid choice: 'yolo'"),
        ("--num-experts 4 --moe-router-load-balancing-type foo", "invalid choice: 'foo'"),
        ("--num-experts 4 --moe-router-load-balancing-type sinkhorn", "sinkhorn would let a token's experts depend on"),
        ("--moe-router-topk 1", "--moe-router-topk has no effect without --num-experts"),
        ("--moe-expert-capacity-factor 1.0", "--moe-expert-capacity-factor is refused on --architecture yoco"),
        ("--normalization LayerNorm", "--normalization LayerNorm: YOCO's norms are RMSNorm"),
        ("--recompute-granularity selective --recompute-modules moe", "--recompute-modules moe: a YOCO's layer has no"),
        ("--exp-avg-dtype fp8", "--exp-avg-dtype: plans do not count what it changes; remove it"),
        ("--architecture transformer --mtp-num-layers 1", "--mtp-num-layers is refused on --architecture transformer"),
        ("--optimizer sgd", "--optimizer sgd: plans count the memory of adam, muon and lion alone"),
    ],
)
def test_numbers_and_words_that_the_trainer_refuses(more, message):
    with pytest.raises(ValueError, match=message):
        flags.parse([*MODEL, *more.split()], gpus=1)
