"""Checkpoint safety in Megatron's saving and loading: a manifest, one save at a time, pruning, fall-back."""

import contextlib
import errno
import functools
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.training import async_utils, get_args
from torch.distributed.checkpoint.api import CheckpointException

from yoco_megatron.checkpoint import integrity, pruning
from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.upstream.registry import relies_on, replaces
from yoco_megatron.upstream.resumed_learning_rates import checkpoint_rates_while_loading

extra_files: dict[str, Callable[[], str]] = {}
"""Name of a small file that each checkpoint shall hold -> its text, asked for when the save begins."""
after_load: list[Callable[[Path], None]] = []
"""Called on every process with the folder of the checkpoint that was loaded."""


@replaces(
    "megatron.core.dist_checkpointing",
    "save",
    digest="40136f3a30285954",
    why="the manifest must come after metadata.json, and before megatron/training/checkpointing.py prints that the "
    "checkpoint is saved",
)
def save_sharded(state_dict: dict, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Megatron's save, which ends, now or when the background writers are done, with our manifest.

    Raises:
        OSError: there is no room for it, on every process, before anything is written if that is known.
    """
    path = Path(checkpoint_dir)

    def make_room() -> None:
        # A damaged checkpoint of this iteration may be here: it is not one again until this save has ended.
        for marker in (checkpoints.COMPLETE, checkpoints.MANIFEST, checkpoints.ANSWERED):
            (path / marker).unlink(missing_ok=True)
        _check_room(path)

    integrity.run_on_rank0(make_room)
    extras = {name: text() for name, text in extra_files.items()}
    request = _raise_storage_errors(save_sharded.original, path)(state_dict, checkpoint_dir, *args, **kwargs)
    if request is None:
        integrity.write_manifest(path, extras)
    else:
        request.finalize_fns[:] = [_raise_storage_errors(finish, path) for finish in request.finalize_fns]
        request.finalize_fns.append(lambda: integrity.write_manifest(path, extras))
    return request


def _check_room(path: Path) -> None:
    """Raise OSError if a checkpoint as large as the newest does not fit."""
    newest = checkpoints.iterations(path.parent)[:1]
    needed = sum(checkpoints.size_of(checkpoints.path_of(path.parent, one)) for one in newest)
    state = os.statvfs(path.parent)
    free = state.f_bavail * state.f_frsize + checkpoints.size_of(path)
    if free < needed:
        message = f"{os.strerror(errno.ENOSPC)}: {free:,} bytes free, a checkpoint takes {needed:,}"
        raise OSError(errno.ENOSPC, message, str(path))


def _raise_storage_errors(writing: Callable, path: Path) -> Callable:
    """`writing`, which raises the file system's error where there is one: Megatron's writers hide it."""

    @functools.wraps(writing)
    def write(*args: Any, **kwargs: Any) -> Any:
        try:
            return writing(*args, **kwargs)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            try:
                _check_room(path)
                with tempfile.TemporaryFile(dir=path) as probe:
                    probe.write(bytes(1 << 20))
                    probe.flush()
                    os.fsync(probe.fileno())
            except OSError as fault:
                raise fault from error
            raise RuntimeError(f"checkpoint {path} could not be written: {error}") from error

    return write


@replaces(
    "megatron.training.training",
    "save_checkpoint",
    digest="3b85f44e9cfa552d",
    calls=3,  # two of them convert formats
    why="a save must wait for the asynchronous one before it, so that host memory holds one copy; old ones are pruned",
)
def save_checkpoint(*args: Any, **kwargs: Any) -> None:
    options = get_args()
    if options.async_save and not async_utils.is_empty_async_queue():
        async_utils.maybe_finalize_async_save(blocking=True)
    save_checkpoint.original(*args, **kwargs)
    if dist.get_rank() == 0 and options.keep_checkpoints:
        pruning.remove_surplus(options.save, options.keep_checkpoints, options.keep_every)


relies_on(
    "megatron.core.rerun_state_machine",
    "RerunStateMachine.validate_state_dict",
    digest="341641d6197fa2ea",
    used_by="upstream/checkpointing.py",
    why="load_checkpoint replaces it for one call: False has the saved state ignored",
)


@replaces(
    "megatron.training.training",
    "load_checkpoint",
    digest="6c056c1e1d1e3fa4",
    calls=3,
    why="it loads the newest checkpoint, whole or not; and with --verify-integrity it reads every file on one process",
)
def load_checkpoint(model: Any, optimizer: Any, scheduler: Any, load_arg: str = "load", **kwargs: Any) -> Any:
    """Megatron's, from the newest checkpoint that is whole.

    Raises:
        ValueError: there is none, or --ckpt-step names one that is not.
    """
    options = get_args()
    source = getattr(options, load_arg)
    iteration = _choose(options, source) if source and options.ckpt_format == "torch_dist" else None
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(options, "verify_integrity", False))  # done, and in parallel
        if iteration is not None:
            folder = checkpoints.path_of(Path(source), iteration)
            patches.enter_context(checkpoint_rates_while_loading(folder, options, optimizer, scheduler))
            if (folder / checkpoints.ANSWERED).exists():
                # Megatron would rerun the step, and end with the same code, in every attempt.
                patches.enter_context(mock.patch.object(RerunStateMachine, "validate_state_dict", return_value=False))
        try:
            result = load_checkpoint.original(model, optimizer, scheduler, load_arg, **kwargs)
        except CheckpointException as error:  # no Exception, so nobody would note it
            raise RuntimeError(f"checkpoint {source} could not be loaded: {error}") from error
    if iteration is not None:
        for act in after_load:
            act(folder)
    return result


def _choose(options: Namespace, source: str) -> int | None:
    if not options.ckpt_step:
        return integrity.newest_good(source)
    wrong = integrity.find_corruption(checkpoints.path_of(Path(source), options.ckpt_step))
    if wrong:
        raise ValueError(f"--ckpt-step {options.ckpt_step} of --load {source} is not whole: {wrong}; name another one")
    return options.ckpt_step
