"""From a command line to the arguments of a run, filled in and checked. The order of the steps is told here alone.

All errors that a user can make are raised as ValueError, before anything is started.
"""

import contextlib
import os
from argparse import Namespace
from collections.abc import Iterator
from unittest import mock

from megatron.training import get_tokenizer
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.models.gpt import GPTModelConfig

from yoco_megatron.checkpoint.architecture import check_loadable
from yoco_megatron.config import numbers
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.data import validation_sets
from yoco_megatron.data.document_ends import check_document_end
from yoco_megatron.data.tokenizer import check_vocabulary
from yoco_megatron.model.builder import model_config_from_args
from yoco_megatron.parallel.pipeline.layout import plan_stages
from yoco_megatron.parallel.pipeline.stages import StagePlan
from yoco_megatron.resilience import arguments as resilience
from yoco_megatron.resilience import run_lock, secrets
from yoco_megatron.startup import agreement, checks, defaults, record
from yoco_megatron.startup.megatrons_errors import as_value_errors
from yoco_megatron.startup.parser import build_parser, parse_flags, smallest_world
from yoco_megatron.upstream import quiet
from yoco_megatron.utils.errors import require


def parse(argv: list[str], processes: int | None = None, reading: bool = False) -> Namespace:
    """Parse a command line with its configs, fill in its defaults and check it; touches no process group and no GPU.

    Args:
        processes: parse as the first of so many would; by default as the environment says.
        reading: the flags are those of an earlier run, whose result is read: what had no effect there has none here.
    Returns:
        Megatron's arguments, not yet through Megatron's own validation (see `finalize`), with one more attribute,
        `resolved_config`, the merged mapping of flags to values.
    Raises:
        ValueError: anything wrong that can be seen without starting.
    """
    with _as_first_of(processes):
        parser = build_parser()
        args = parse_flags(argv, parser)
    numbers.check(args, parser)
    resilience.check(args)
    resilience.fill_in(args)
    if not reading:
        checks.check_effects(args, parser)
        validation_sets.check(args)
    defaults.fill_in_defaults(args)
    checks.check_flags(args, parser)
    defaults.choose_pipeline_layout(args)
    checks.check_files(args)
    return args


def parse_anywhere(argv: list[str]) -> Namespace:
    """As `parse`, for a tool that runs alone with the flags of a run on many GPUs: the smallest world that they fit."""
    return parse(argv, smallest_world(argv))


def parse_for_job(argv: list[str], processes: int) -> tuple[Namespace, StagePlan | None]:
    """As `parse`, with all checks of training that a login node can make for a job of so many processes.

    Returns:
        (arguments with the padded vocabulary, stages of a YOCO's pipeline or None).
    """
    args = parse(argv, processes)
    secrets.refuse((), args.resolved_config)
    checks.check_training(args)
    defaults.fill_in_padded_vocab_size(args)
    is_yoco = args.architecture == "yoco"
    return args, plan_stages(args, ModelShape.from_args(args)) if is_yoco else None


@agreement.of_all_ranks()
def parse_and_validate(argv: list[str], reduce_overhead: bool = True) -> tuple[Namespace, GPTModelConfig]:
    """Everything before training starts: parse, check, make and lock the folders that are written into, set Megatron's
    globals. `run_lock.release` unlocks them; `quiet.end` ends what it does to Megatron's output.

    Args:
        reduce_overhead: turn off features that cost host time without helping the GPU; False for a baseline.
    Returns:
        (Megatron's validated arguments, what builds the model).
    Raises:
        ValueError: a mistake in the command line or in the files it names, found by any of the processes.
    """
    args = parse(argv)
    quiet.begin(args)
    secrets.refuse((), args.resolved_config)
    checks.check_machine(args)
    checks.check_training(args)
    checks.check_launched()
    record.make_folders(args)
    if args.rank == 0:
        run_lock.acquire(args)
    defaults.fill_in_save_interval(args)
    defaults.warn_of_unbalanced_experts(args)
    finalize(args, reduce_overhead)
    check_loadable(args)  # again: the size of the vocabulary is known now
    require(
        args.padded_vocab_size >= get_tokenizer().vocab_size,
        f"--padded-vocab-size {args.padded_vocab_size} is less than the tokenizer's {get_tokenizer().vocab_size} ids: "
        "remove it",
    )
    check_vocabulary(get_tokenizer(), args)
    checks.check_fits(args)
    check_document_end(args, get_tokenizer())
    with megatrons_errors(args):
        model = model_config_from_args(args)
        pretrain_cfg_container_from_args(args, model)  # for its checks: of the optimizer, among others
        return args, model


def finalize(args: Namespace, reduce_overhead: bool = True) -> Namespace:
    """Megatron's own validation, then its global state (tokenizer, timers, writers).

    Raises:
        ValueError: what Megatron finds wrong.
    """
    if reduce_overhead:
        defaults.reduce_host_overhead(args)
    with megatrons_errors(args):
        validate_args(args)
        defaults.list_balancing_losses(args)
        set_global_variables(args)
    return args


def megatrons_errors(args: Namespace) -> contextlib.AbstractContextManager[None]:
    """Inside, what Megatron finds wrong with the arguments is a ValueError that names the flags."""
    return as_value_errors(args, build_parser())


@contextlib.contextmanager
def _as_first_of(processes: int | None) -> Iterator[None]:
    """Inside, the environment is that of the first of so many processes; None changes nothing."""
    world = {} if processes is None else {"WORLD_SIZE": str(processes), "RANK": "0", "LOCAL_RANK": "0"}
    with mock.patch.dict(os.environ, world):
        yield
