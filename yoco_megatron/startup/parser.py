"""The command line: Megatron's parser with our flags, and the YAML configs merged below it.

Order: our defaults, then every --config left to right, then the command line. Checked is only that each flag exists and
that its value has the right type.
"""

import argparse
import copy
import functools
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn
from unittest import mock

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments, parse_args

from yoco_megatron import runtime
from yoco_megatron.config.yaml_files import load_config_files, to_argv
from yoco_megatron.config.yoco_fields import YOCOFields
from yoco_megatron.resilience import arguments as resilience
from yoco_megatron.utils.errors import nearest, require

# Megatron's defaults that are not a YOCO's (paper section 2 and the authors' code), by argparse destination.
YOCO_DEFAULTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "eval_interval": 1000,  # Megatron has none and then divides by it
    "ckpt_format": "torch_dist",
    "async_strategy": "mcore",  # our writer (upstream/background_writer.py); Megatron's default is another package's
    "log_throughput": True,
    # One seed, one run at any mesh: Megatron's updates each tensor-parallel rank's part as if it were the matrix.
    "muon_tp_mode": "duplicated",
    # A checkpoint must load at any mesh, optimizer included.
    "dist_ckpt_optim_fully_reshardable": True,
}

OUR_GROUPS = ("YOCO", "resilience")


class _HelpOfOurs(argparse.Action):
    """`--help` has four thousand lines, nearly all of them Megatron's."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        formatter = parser.formatter_class(prog=parser.prog)
        for group in parser._action_groups:
            if group.title in OUR_GROUPS:
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        print(formatter.format_help(), end="")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Megatron's parser with our group: every flag that pretrain_gpt.py users know, and ours. Not to be changed."""
    return _parser(**runtime.argument_defaults())


@functools.cache  # it takes 0.05 s, and is asked for many times
def _parser(**defaults: Any) -> argparse.ArgumentParser:
    return _new_parser(defaults)


def _new_parser(defaults: dict[str, Any]) -> argparse.ArgumentParser:
    """With the group "YOCO", our defaults and our error messages; `defaults` win over ours, by destination."""
    parser = add_megatron_arguments(argparse.ArgumentParser(prog="pretrain_yoco.py", allow_abbrev=False))
    group = ArgumentGroupFactory(YOCOFields).build_group(parser, "YOCO")
    group.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="continue a checkpoint that was trained on other data, or with another tokenizer",
    )
    group.add_argument(
        "--sample-packing",
        choices=["stream", "documents"],
        help="what a sample of --seq-length tokens is: so many of the stream of all documents, or whole documents, "
        "which do not attend to each other, and padding (docs/data.md). Default: documents where a dataset has a loss "
        "mask",
    )
    group.add_argument(
        "--config",
        action="append",
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files of flags, or key=value items, merged left to right; the command line wins over them.",
    )
    group.add_argument(
        "--teacher",
        metavar="FOLDER",
        help="A Transformer in Hugging Face's format, to be learnt from (docs/upcycling.md).",
    )
    group.add_argument(
        "--attention-transfer",
        action="store_true",
        help="Fit each layer's attention to the teacher's, instead of the model to its logits.",
    )
    group.add_argument(
        "--distillation-weight",
        type=float,
        default=0.9,
        metavar="WEIGHT",
        help="Of the divergence from the teacher's logits in the loss; cross entropy has the rest of 1.",
    )
    group.add_argument(
        "--distillation-temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="Divides both models' logits where they are compared.",
    )
    group.add_argument("--evaluate-suite", metavar="FILE", help="YAML of tasks that are evaluated between steps.")
    group.add_argument("--evaluate-interval", type=int, metavar="STEPS", help="Steps from one evaluation to the next.")
    group.add_argument(
        "--verbose",
        action="store_true",
        help="print all that Megatron prints: its arguments, its log, and its own line for a step",
    )
    group.add_argument(
        "--help-yoco",
        action=_HelpOfOurs,
        dest="help",
        default=argparse.SUPPRESS,
        nargs=0,
        help="show only the flags of this package, and exit",
    )
    resilience.add(parser)
    for action in parser._actions:  # a lone % in one help text of megatron-core 0.19 makes --help fail
        action.help = re.sub(r"%%|%(?!\()", "%%", action.help or "")
        if action.type not in (None, int, float, str, bool):
            action.type = _reading(action)
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{dest: v for dest, v in (YOCO_DEFAULTS | defaults).items() if dest in known})

    def error(message: str) -> NoReturn:
        # argparse would print the usage of some nine hundred flags first.
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0]
            message += nearest(flag, parser._option_string_actions)
        raise ValueError(message)

    parser.error = error
    return parser


def _reading(action: argparse.Action) -> Callable[[str], Any]:
    """The type of a flag, a function, with errors that argparse knows."""
    function, choices = action.type, action.choices

    def read(text: str) -> Any:
        try:
            return function(text)  # type: ignore[operator, misc]
        except Exception as error:
            names = f", choose from {', '.join(getattr(one, 'name', str(one)) for one in choices)}" if choices else ""
            raise argparse.ArgumentTypeError(f"invalid value: {text!r}{names} ({error})") from None

    return read


def parse_flags(argv: list[str], parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Megatron's arguments as the command line and its configs give them, and nothing more.

    Args:
        parser: of `build_parser`.
    Returns:
        with one more attribute, `resolved_config`, the merged mapping of flags to values.
    Raises:
        ValueError: a flag that does not exist, a value of the wrong type, a config that cannot be read.
    """
    merged = _with_configs(argv, parser)
    require(
        all(token.partition("=")[0] != "--yaml-cfg" for token in merged),
        "--yaml-cfg replaces every other flag in Megatron, and knows none of ours: use --config",
    )
    with (
        mock.patch.object(sys, "argv", ["pretrain_yoco.py", *merged]),
        mock.patch("megatron.training.arguments.add_megatron_arguments", return_value=parser),
    ):
        try:
            args = copy.deepcopy(parse_args())  # a list that is changed later is not the parser's default
        except RuntimeError as error:  # of --enable-msc without its package
            raise ValueError(str(error)) from error
    args.resolved_config = explicit_flags(merged)
    return args


def smallest_world(argv: list[str]) -> int:
    """Number of processes of one copy of the model, at the mesh that `argv` and its configs name."""
    parser = build_parser()
    args, _ = parser.parse_known_args(_with_configs(argv, parser))
    return args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size


def _with_configs(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line with the flags of its configs before its own."""
    config_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_only.add_argument("--config", action="append", nargs="+", default=[])
    config_only.error = parser.error  # type: ignore[method-assign]
    given, rest = config_only.parse_known_args(argv)
    return [*to_argv(load_config_files([source for group in given.config for source in group]), parser), *rest]


def explicit_flags(argv: list[str]) -> dict[str, Any]:
    """The flags that `argv` sets, by name without --, in the form that `load_config_files` reads back."""
    parser = _parser_of_text()
    namespace = parser.parse_args(argv)
    by_dest = {}
    for flag in (token.partition("=")[0] for token in argv):  # --flag value, or --flag=value
        if flag in parser._option_string_actions:
            action = parser._option_string_actions[flag]
            value = True if action.nargs == 0 else getattr(namespace, action.dest)
            by_dest[action.dest] = (flag.lstrip("-").replace("_", "-"), value)
    return {name: _plain(value) for name, value in by_dest.values()}


@functools.cache
def _parser_of_text() -> argparse.ArgumentParser:
    """argparse gives typed values; what a YAML file should hold is what was written."""
    parser = _new_parser({})
    parser._defaults.clear()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.type = None
        action.choices = None
    return parser


def _plain(value: Any) -> Any:
    """Numbers as numbers, so that the file reads as a person would write it; everything else as it came."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value) if str(kind(value)) == value else value
            except ValueError:
                continue
    return value
