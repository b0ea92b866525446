"""From the command line and YAML configs to Megatron's validated arguments.

Order: our defaults, then every --config left to right, then the command line. All errors a user can make are raised
here as ValueError, before anything is started.
"""

import argparse
import contextlib
import functools
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import yaml
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as megatrons_tokenizer
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments, parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from yoco_megatron import runtime
from yoco_megatron.checkpoint.architecture import check_loadable, check_there
from yoco_megatron.checkpoint.layout import RESOLVED
from yoco_megatron.config import rules
from yoco_megatron.config.yaml_files import load_config_files, to_argv
from yoco_megatron.config.yoco_fields import YOCOFields
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.data import fingerprint
from yoco_megatron.data.check import check_data_prefixes, check_split, check_validation, data_prefixes_from_args
from yoco_megatron.data.plan import DEFAULT_SPLIT
from yoco_megatron.data.tokenizer import check_flags as check_tokenizer_flags
from yoco_megatron.parallel.pipeline import planner
from yoco_megatron.parallel.pipeline.layout import check_micro_batches, choose_layout, sequences_at_a_time
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.resilience import arguments as resilience
from yoco_megatron.startup import resume_schedule
from yoco_megatron.utils.errors import nearest, require
from yoco_megatron.utils.files import write_atomically

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
    # A checkpoint must load at any mesh, optimizer included.
    "dist_ckpt_optim_fully_reshardable": True,
}

DATA_FLAGS = ("--data-path", "--train-data-path", "--data-args-path", "--per-split-data-args-path")


def add_yoco_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "YOCO", our defaults and our error messages to Megatron's parser."""
    group = ArgumentGroupFactory(YOCOFields).build_group(parser, "YOCO")
    group.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="continue a checkpoint that was trained on other data, or with another tokenizer",
    )
    group.add_argument(
        "--config",
        action="append",
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files of flags, or key=value items, merged left to right; the command line wins over them.",
    )
    resilience.add(parser)
    for action in parser._actions:  # a lone % in one help text of megatron-core 0.19 makes --help fail
        action.help = re.sub(r"%%|%(?!\()", "%%", action.help or "")
    known = {action.dest for action in parser._actions}
    parser.set_defaults(
        **{dest: v for dest, v in (YOCO_DEFAULTS | runtime.argument_defaults()).items() if dest in known}
    )

    def error(message: str) -> NoReturn:
        # argparse would print the usage of some nine hundred flags first.
        if message.startswith("unrecognized arguments: "):
            flag = message.split(": ", 1)[1].split()[0]
            message += nearest(flag, parser._option_string_actions)
        raise ValueError(message)

    parser.error = error  # type: ignore[method-assign]
    return parser


@functools.cache
def _read_help_once() -> None:
    """Megatron takes the help of flags from the source of config classes, for a tenth of a second and anew for each of
    the four parsers that a start needs: remember it.
    """
    read, known = ArgumentGroupFactory._get_field_docstrings, {}

    @functools.wraps(read)
    def read_once(self: ArgumentGroupFactory, config_class: type) -> dict[str, str]:
        if config_class not in known:
            known[config_class] = read(self, config_class)
        return known[config_class]

    ArgumentGroupFactory._get_field_docstrings = read_once


def build_parser() -> argparse.ArgumentParser:
    """Megatron's parser with our group: every flag that pretrain_gpt.py users know, and ours."""
    _read_help_once()
    parser = argparse.ArgumentParser(prog="pretrain_yoco.py", allow_abbrev=False)
    return add_yoco_arguments(add_megatron_arguments(parser))


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line with its configs and check it; touches no process group and no GPU.

    Returns:
        Megatron's arguments, not yet through Megatron's own validation (see `finalize`), with one more attribute,
        `resolved_config`, the merged mapping of flags to values.
    Raises:
        ValueError: anything wrong that can be seen without starting.
    """
    parser = build_parser()
    merged = _with_configs(argv, parser)
    require(
        all(token.partition("=")[0] != "--yaml-cfg" for token in merged),
        "--yaml-cfg replaces every other flag in Megatron, and knows none of ours: use --config",
    )
    with mock.patch.object(sys, "argv", ["pretrain_yoco.py", *merged]):
        args = parse_args(extra_args_provider=add_yoco_arguments)
    args.resolved_config = explicit_flags(merged)
    resilience.apply(args)
    check(args, parser)
    return args


def _with_configs(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The command line with the flags of its configs before its own."""
    config_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_only.add_argument("--config", action="append", nargs="+", default=[])
    config_only.error = parser.error  # type: ignore[method-assign]
    given, rest = config_only.parse_known_args(argv)
    return [*to_argv(load_config_files([source for group in given.config for source in group]), parser), *rest]


def parse_anywhere(argv: list[str]) -> argparse.Namespace:
    """As `parse`, for a tool that runs alone with the flags of a run on many GPUs: the smallest world that they fit."""
    parser = build_parser()
    args, _ = parser.parse_known_args(_with_configs(argv, parser))
    world = args.tensor_model_parallel_size * args.pipeline_model_parallel_size * args.context_parallel_size
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(world), "RANK": "0"}):
        return parse(argv)


def explicit_flags(argv: list[str]) -> dict[str, Any]:
    """The flags that `argv` sets, by name without --, in the form that `load_config_files` reads back."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    # argparse gives typed values; what a YAML file should hold is what was written.
    for action in parser._actions:
        action.type = None
        action.choices = None
    namespace = parser.parse_args(argv)
    by_dest = {}
    for flag in (token.partition("=")[0] for token in argv):  # --flag value, or --flag=value
        if flag in parser._option_string_actions:
            action = parser._option_string_actions[flag]
            value = True if action.nargs == 0 else getattr(namespace, action.dest)
            by_dest[action.dest] = (flag.lstrip("-").replace("_", "-"), value)
    return {name: _plain(value) for name, value in by_dest.values()}


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


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """All rules on parsed arguments, and on the files they name."""
    for dest in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "micro_batch_size"):
        flag = "--" + dest.replace("_", "-")
        require(getattr(args, dest) is not None, f"{flag} is missing: set it, or use a config of configs/model/")
        require(getattr(args, dest) >= 1, f"{flag} {getattr(args, dest)} must be at least 1")
    if args.max_position_embeddings is None:
        args.max_position_embeddings = args.seq_length
    rules.fill_in_loss_chunk(args)
    rules.check_mesh(args)
    rules.check_optimizer(args)
    rules.check_ignored(args, parser)
    require(
        args.group_query_attention or args.num_query_groups == parser.get_default("num_query_groups"),
        f"--num-query-groups {args.num_query_groups} has no effect without --group-query-attention: set both",
    )
    if args.architecture == "yoco":
        rules.check_model(model_fields(args))
        if args.pipeline_model_parallel_size > 1 and args.padded_vocab_size is None:
            build_tokenizer(args)  # the head's cost decides where the planner cuts; sets args.padded_vocab_size
        stages = choose_layout(args, ModelShape.from_args(args))
        if stages is not None:
            check_micro_batches(args, stages.count)
    if args.mock_data:
        named = [name for name in DATA_FLAGS if getattr(args, name[2:].replace("-", "_"))]
        require(not named, f"{' and '.join(named)} and --mock-data contradict each other: keep one of them")
    else:
        prefixes = data_prefixes_from_args(args)
        require(
            bool(prefixes) or args.skip_train,
            "--data-path is missing: name a prefix of .bin/.idx files, or use --mock-data",
        )
        check_data_prefixes(prefixes)
        if args.data_path is not None or (args.data_args_path is not None and args.split is not None):
            check_split(prefixes, args.split or DEFAULT_SPLIT)
    check_loadable(args)


def model_fields(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of the arguments whose model fields mean what they will mean to YOCOConfig."""
    fields = argparse.Namespace(**vars(args))
    if not args.group_query_attention:
        fields.num_query_groups = None
    if args.ffn_hidden_size is None:
        fields.ffn_hidden_size = ModelShape.from_args(args).ffn_hidden_size
    rules.fill_in_defaults(fields)
    return fields


def check_run(args: argparse.Namespace) -> None:
    """What only training has to have: tools that read the flags of a run do without.

    Raises:
        ValueError: no tokenizer, or not that of the data; a length or warm-up that Megatron would stumble over; nothing
            to evaluate on; no checkpoint where one must be, or one that was trained on other data or another schedule.
    """
    check_tokenizer_flags(args)
    resume_schedule.check(args)
    if args.data_path is not None and not args.skip_train and (args.eval_iters > 0 or args.full_validation):
        check_validation(args.split or DEFAULT_SPLIT)
    fingerprint.check_tokenizer(args)
    check_there(args)
    fingerprint.check_resumable(args)
    resume_schedule.check_resumable(args)


def check_machine(args: argparse.Namespace) -> None:
    """What only the machine that trains has to have: a login node that submits the job may lack it.

    Raises:
        ValueError: Transformer Engine, a GPU or wandb is asked for, and missing.
    """
    require(
        not args.wandb_project or importlib.util.find_spec("wandb") is not None,
        f"--wandb-project {args.wandb_project} needs wandb, which is missing: pip install wandb",
    )
    for flag, wanted in (("--fp8-format", args.fp8), ("--tp-comm-overlap", args.tp_comm_overlap)):
        require(
            not (wanted and args.transformer_impl == "local"),
            f"{flag} needs the layers of Transformer Engine, and plain torch is used here: see tools/doctor.py",
        )
    if args.transformer_impl == "transformer_engine" and not runtime.has_transformer_engine():
        raise ValueError(
            "--transformer-impl transformer_engine: Transformer Engine is not usable here; "
            "leave the flag away for plain torch, or see tools/doctor.py for how to install it"
        )
    require(
        args.cuda_graph_impl == "none" or runtime.has_gpu(),
        f"--cuda-graph-impl {args.cuda_graph_impl} needs a GPU, and there is none: leave it away",
    )


def check_started() -> None:
    """A process must know where the others are, before anything is written for it.

    Raises:
        ValueError: nothing says where.
    """
    require(
        {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys(),
        "MASTER_ADDR and MASTER_PORT are not set: start it by torchrun, for one GPU as "
        "torchrun --nproc-per-node 1 pretrain_yoco.py ..., or on a cluster by launch/slurm/submit.py",
    )


def finalize(args: argparse.Namespace) -> argparse.Namespace:
    """Megatron's own validation, then its global state (tokenizer, timers, writers).

    Raises:
        ValueError: what Megatron asserts, as its message.
    """
    _spare_the_host(args)
    with refusals():
        validate_args(args)
        set_global_variables(args)
    return args


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Inside, what Megatron asserts about the arguments is a ValueError."""
    try:
        yield
    except AssertionError as error:
        raise ValueError(str(error) or _failed_assertion(error)) from error


def build_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer; sets `args.padded_vocab_size`.

    Raises:
        ValueError: flags that name none.
    """
    check_tokenizer_flags(args)
    return megatrons_tokenizer(args)


def check_writable(args: argparse.Namespace) -> None:
    """Make the folders that the run writes into.

    Raises:
        ValueError: one that cannot be made or written.
    """
    for flag, folder in (("--save", args.save), ("--tensorboard-dir", args.tensorboard_dir)):
        if folder is None or "://" in folder:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{flag} {folder}: cannot write there ({error.strerror})") from error


def _spare_the_host(args: argparse.Namespace) -> None:
    """Leave out what keeps the processor busy, or waiting, and gives the GPU nothing. What Megatron would refuse is
    left to it.
    """
    # Without another rank of data parallelism there is nothing to overlap, but the hooks for it still cost half a
    # millisecond for every bucket.
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size == model and args.use_distributed_optimizer and not args.use_megatron_fsdp:
        args.overlap_grad_reduce = args.overlap_param_gather = args.overlap_param_gather_with_optimizer_step = False
    # Fused bias, dropout and addition are, without the first two, one addition behind torch.compile's guards.
    if not args.add_bias_linear and not args.hidden_dropout:
        args.bias_dropout_fusion = False
    # In 1F1B the host waits for the GPU at each exchange, for a PyTorch that might free what is being sent. That of
    # today keeps it until the stream has waited, and a host that goes on has the next stage's work ready.
    args.batch_p2p_sync = False


def _failed_assertion(error: AssertionError) -> str:
    """Most of Megatron's assertions have no message: then the condition itself must say what is wrong."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron refuses these arguments: {place.line} ({place.filename}, line {place.lineno})"


def pipeline_table(args: argparse.Namespace, plan: StagePlan) -> str:
    """The stages of a pipelined YOCO, a line each: layers, parameters, FLOPs, bytes, expected bubble."""
    shape = ModelShape.from_args(args)
    return planner.table(
        plan,
        shape,
        planner.Costs.of_run(shape, args),
        args.pipeline_model_parallel_size,
        args.global_batch_size // sequences_at_a_time(args),
        args.micro_batch_size,
        args.params_dtype.itemsize,
    )


def save_resolved_config(args: argparse.Namespace, folder: str) -> Path:
    """Write the merged flags beside the checkpoints; `--config` reads the file back."""
    return write_atomically(Path(folder) / RESOLVED, yaml.safe_dump(args.resolved_config, sort_keys=True))


@contextlib.contextmanager
def world_of(processes: int) -> Iterator[None]:
    """Inside, Megatron's arguments are parsed as the first of so many processes would."""
    before = dict(os.environ)
    os.environ |= {"WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
