"""One rule for the numbers of all flags."""

import math

import pytest

from yoco_megatron.config import numbers
from yoco_megatron.startup import arguments
from yoco_megatron.startup.parser import build_parser

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2"
MINIMAL = [*SIZES.split(), "--mock-data"]


@pytest.fixture(scope="module")
def parser():
    return build_parser()


def problem(parser, dest: str, value: float) -> str | None:
    args = parser.parse_args([])
    setattr(args, dest, value)
    try:
        numbers.check(args, parser)
    except ValueError as error:
        return str(error)


def test_every_float_must_be_finite(parser):
    floats = [action for action in parser._actions if action.type is float]
    assert len(floats) > 50
    for action in floats:
        for value in (math.nan, math.inf, -math.inf):
            value = [value] if action.nargs else value
            assert action.option_strings[0] in (problem(parser, action.dest, value) or "taken"), value


def test_the_defaults_pass(parser):
    numbers.check(parser.parse_args([]), parser)


def test_nothing_is_negative_but_what_may_be(parser):
    taken = {
        action.dest
        for action in parser._actions
        if action.type in (int, float) and problem(parser, action.dest, [-2] if action.nargs else -2) is None
    }
    by_default = {"rl_default_top_k", "null_tokenizer_pad_id", "inference_batch_times_seqlen_threshold"}
    assert taken == numbers.SIGNED | by_default


def test_the_names_are_flags(parser):
    known = {action.dest for action in parser._actions}
    assert known >= numbers.SIGNED | numbers.ABOVE_ZERO | numbers.MAY_BE_ZERO | numbers.BELOW_ONE


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--clip-grad nan", "--clip-grad nan must be a finite number"),
        ("--config lr=.inf", "--lr inf must be a finite number"),
        ("--train-iters 0", "--train-iters 0 must be at least 1"),
        ("--eval-interval 0", "--eval-interval 0 must be at least 1"),
        ("--num-workers -1", "--num-workers -1 must not be negative"),
        ("--adam-beta2 1", "--adam-beta2 1.0 must be below 1"),
        ("--muon-momentum 1.5", "--muon-momentum 1.5 must be below 1"),
        ("--seed 99999999999999999999", "--seed 99999999999999999999 is too large"),
        ("--hang-timeout 1e9 --run-folder run", "--hang-timeout 1000000000.0 is too large"),
        ("--fp16 --loss-scale-window 0", "--loss-scale-window 0.0 must be above 0"),
        ("--fp16 --hysteresis 0", "--hysteresis 0 must be at least 1"),
        ("--fp16 --min-loss-scale 1e30", "--initial-loss-scale .* is below --min-loss-scale 1e[+]30"),
        ("--enable-msc", "--enable-msc was passed but"),
        ("--attention-backend fast", "--attention-backend: invalid value: 'fast', choose from flash"),
        ("--exit-signal SIGNAL", "--exit-signal: invalid value: 'SIGNAL', choose from SIGHUP"),
    ],
)
def test_on_the_command_line(flags, message):
    with pytest.raises(ValueError, match=message):
        arguments.parse([*MINIMAL, *flags.split()])


@pytest.mark.parametrize(
    "flags",
    [
        "--eval-iters 0",
        "--loss-chunk-size 0",
        "--lr 0",
        "--tokenizer-type NullTokenizer --vocab-size 9 --null-tokenizer-pad-id -5",
    ],
)
def test_what_means_something_passes(flags):
    arguments.parse([*MINIMAL, *flags.split()])
