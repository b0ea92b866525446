"""Whatever Megatron raises about arguments is one error that names the flags."""

import runpy
import sys

import pytest

from yoco_megatron.startup import arguments
from yoco_megatron.startup.megatrons_errors import as_value_errors
from yoco_megatron.startup.parser import build_parser

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2"
MINIMAL = [*SIZES.split(), "--mock-data", "--train-iters", "2", "--lr", "1e-4"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # an assertion without a text
        ("--min-lr 1e-3", r"^--min-lr 0\.001, --lr 0\.0001: Megatron needs args\.min_lr <= args\.lr$"),
        # a text that names a flag
        ("--overlap-param-gather", "^--overlap-param-gather only supported with"),
    ],
)
def test_of_validation(flags, message):
    args = arguments.parse([*MINIMAL, *flags.split()])
    with pytest.raises(ValueError, match=message):
        arguments.finalize(args)


def told(raises) -> str:
    args = arguments.parse(MINIMAL)
    with pytest.raises(ValueError) as error, as_value_errors(args, build_parser()):
        raises(args)
    return str(error.value)


def test_conditions_over_several_lines(tmp_path):
    """In a file of its own: pytest gives each assertion of a test a text."""
    path = tmp_path / "upstream.py"
    path.write_text("def validate(args):\n    assert (\n        args.seq_length\n        == args.train_iters\n    )\n")
    validate = runpy.run_path(str(path))["validate"]
    assert told(validate) == (
        "--seq-length 64, --train-iters 2: Megatron needs ( args.seq_length == args.train_iters )"
    )


def test_other_errors():
    assert told(lambda args: args.seq_length["x"]).startswith(
        "--seq-length 64: Megatron cannot use these arguments (Type"
    )
    assert told(lambda args: sys.exit(0)) == "Megatron refuses these arguments: see the line above"
    with pytest.raises(OSError, match="disk"):
        told(lambda args: (_ for _ in ()).throw(OSError("disk")))
