"""Hooks of checkpoint safety into Megatron's saving and loading.

megatron/training/checkpointing.py calls dist_checkpointing.save       -> the manifest, before "successfully saved"
megatron/training/training.py calls save_checkpoint, load_checkpoint   -> one save at a time, retention; fall-back
"""

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
from megatron.training import async_utils, checkpointing, get_args, training
from torch.distributed.checkpoint.api import CheckpointException

from yoco_megatron.checkpoint import integrity, pruning
from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.upstream import resumed_learning_rates

_save_sharded = checkpointing.dist_checkpointing.save
_save_checkpoint = training.save_checkpoint
_load_checkpoint = training.load_checkpoint

extra_files: dict[str, Callable[[], str]] = {}
"""Name of a small file that each checkpoint shall hold -> its text, asked for when the save begins."""
after_load: list[Callable[[Path], None]] = []
"""Called on every process with the folder of the checkpoint that was loaded."""


def install() -> None:
    """Make every torch_dist checkpoint of this process's run sealed when saved and checked when loaded."""
    checkpointing.dist_checkpointing = _WithSeal(checkpointing.dist_checkpointing)
    training.save_checkpoint = save_checkpoint
    training.load_checkpoint = load_checkpoint


class _WithSeal:
    """The module `megatron.core.dist_checkpointing` with another `save`."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    save = staticmethod(lambda *args, **kwargs: save_sharded(*args, **kwargs))


@functools.wraps(_save_sharded)
def save_sharded(state_dict: dict, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Megatron's save, which ends, now or when the background writers are done, with our manifest.

    Raises:
        OSError: there is no room for it, on every process, before anything is written where that can be told.
    """
    path = Path(checkpoint_dir)

    def make_room() -> None:
        # Written over a checkpoint that was passed over: it is none until this save has ended.
        for marker in (checkpoints.COMPLETE, checkpoints.MANIFEST, checkpoints.ANSWERED):
            (path / marker).unlink(missing_ok=True)
        _check_room(path)

    integrity.agree(make_room)
    extras = {name: text() for name, text in extra_files.items()}
    request = _told_apart(_save_sharded, path)(state_dict, checkpoint_dir, *args, **kwargs)
    if request is None:
        integrity.seal(path, extras)
    else:
        request.finalize_fns[:] = [_told_apart(finish, path) for finish in request.finalize_fns]
        request.finalize_fns.append(lambda: integrity.seal(path, extras))
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


def _told_apart(writing: Callable, path: Path) -> Callable:
    """`writing`, whose failure is raised as what the file system itself says: the writers hide their cause."""

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


@functools.wraps(_save_checkpoint)
def save_checkpoint(*args: Any, **kwargs: Any) -> None:
    """Megatron's; waits for the asynchronous save before, so that host memory holds one copy; then retention."""
    options = get_args()
    if options.async_save and not async_utils.is_empty_async_queue():
        async_utils.maybe_finalize_async_save(blocking=True)
    _save_checkpoint(*args, **kwargs)
    if dist.get_rank() == 0 and options.keep_checkpoints:
        pruning.remove_surplus(options.save, options.keep_checkpoints, options.keep_every)


@functools.wraps(_load_checkpoint)
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
            patches.enter_context(resumed_learning_rates.taken_from(folder, options, optimizer, scheduler))
            if (folder / checkpoints.ANSWERED).exists():
                # Megatron would run the step again, and end with the same code, in every attempt.
                patches.enter_context(mock.patch.object(RerunStateMachine, "validate_state_dict", return_value=False))
        try:
            result = _load_checkpoint(model, optimizer, scheduler, load_arg, **kwargs)
        except CheckpointException as error:  # no Exception, so nobody would note it
            raise RuntimeError(f"checkpoint {source} could not be loaded: {error}") from error
    if iteration is not None:
        for act in after_load:
            act(folder)
    return result


def _choose(options: Namespace, source: str) -> int | None:
    if not options.ckpt_step:
        return integrity.newest_good(source)
    wrong = integrity.fault(checkpoints.path_of(Path(source), options.ckpt_step))
    if wrong:
        raise ValueError(f"--ckpt-step {options.ckpt_step} of --load {source} is not whole: {wrong}; name another one")
    return options.ckpt_step
