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

from yoco_megatron.checkpoint import integrity, pruning, timeline
from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.upstream.registry import relies_on, replaces
from yoco_megatron.upstream.resumed_learning_rates import checkpoint_rates_while_loading

NON_PERSISTENT = "non_persistent"  # as megatron/training/checkpointing.py names its folder

extra_files: dict[str, Callable[[], str]] = {}
"""Name of a small file that each checkpoint shall hold -> its text, asked for when the save begins."""
after_load: list[Callable[[Path], None]] = []
"""Called on every process with the folder of the checkpoint that was loaded."""
_loaded: int | None = 0  # the iteration that this run goes on from; None once newer checkpoints are left behind


def folders_of_saves(options: Namespace) -> list[Path]:
    """Where the run saves: what is not persistent first, if there is any, and --save."""
    save = [Path(options.save)]
    if options.non_persistent_ckpt_type != "global":
        return save
    return [Path(options.non_persistent_global_ckpt_dir or save[0] / NON_PERSISTENT), *save]


def go_back(iteration: int) -> None:
    """Never again load what the run has saved after `iteration`. Collective; raises OSError on every rank."""

    def act() -> None:
        for folder in folders_of_saves(get_args()):
            timeline.go_back(folder, iteration)
            if folder.name == NON_PERSISTENT:  # Megatron keeps the one with the highest number
                pruning.remove_abandoned(folder)

    integrity.run_on_rank0(act)


def leave_newer_behind() -> None:
    """Before the first save, or another choice among checkpoints: newer ones than the loaded one are not this run's.

    They are there after --ckpt-step, or where newer ones are damaged. Collective.
    """
    global _loaded
    if _loaded is not None:
        go_back(_loaded)
        _loaded = None


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

    leave_newer_behind()

    def make_room() -> None:
        # A damaged checkpoint of this iteration may be here: it is not one again until this save has ended.
        for marker in (checkpoints.COMPLETE, checkpoints.MANIFEST, checkpoints.ANSWERED, checkpoints.ABANDONED):
            (path / marker).unlink(missing_ok=True)
        for notes in path.glob(f"{integrity.NOTES}*"):
            notes.unlink()
        _check_room(path)

    integrity.run_on_rank0(make_room)
    extras = {name: text() for name, text in extra_files.items()}
    request = _raise_storage_errors(save_sharded.original, path)(state_dict, checkpoint_dir, *args, **kwargs)
    if request is None:
        integrity.write_manifest(path, extras)
    else:
        if request.async_fn is not None and kwargs["async_strategy"] == "mcore":
            files, notes = [Path(bucket[0]) for bucket in request.async_fn_args[1]], integrity.notes_of_rank(path)
            write = functools.partial(integrity.write_then_hash, request.async_fn, files, notes)
            request = request._replace(async_fn=write)
        request.finalize_fns[:] = [_raise_storage_errors(finish, path) for finish in request.finalize_fns]
        request.finalize_fns.append(lambda: integrity.write_manifest(path, extras))
    return request


relies_on(
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "FileSystemWriterAsync.get_save_function_and_args",
    digest="2dbefbb27a2e1403",
    used_by="upstream/checkpointing.py",
    why="save_sharded: the second argument of what writes is a list of (path, ...)",
)


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
    if not options.async_save:
        _prune()


@replaces(
    "megatron.training.checkpointing",
    "schedule_async_save",
    digest="b0efc6de68ba2d03",
    calls=2,
    why="old checkpoints are pruned when the new one is complete",
)
def schedule_async_save(async_request: Any) -> None:
    async_request.add_finalize_fn(_prune)
    schedule_async_save.original(async_request)
    if get_args().async_strategy == "mcore" and async_request.async_fn is not None:
        for _, _, (_, tensors) in async_request.async_fn_args[1]:
            tensors.clear()  # the writer has its copy, and Megatron holds the request until the save is complete


def _prune() -> None:
    options = get_args()
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
        ValueError: there is none, or --ckpt-step names one that is not; or that of --pretrained-checkpoint is not.
    """
    global _loaded
    options = get_args()
    source = getattr(options, load_arg)
    folder = None
    if options.ckpt_format == "torch_dist":
        folder = _choose(options, Path(source)) if source else None
        if folder is None and options.pretrained_checkpoint is not None:
            _check_pretrained(Path(options.pretrained_checkpoint))
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(options, "verify_integrity", False))  # done, and in parallel
        if options.ckpt_step:  # else Megatron prefers what is newer than that and not persistent
            patches.enter_context(mock.patch.object(options, "non_persistent_ckpt_type", None))
        if folder is not None:
            patches.enter_context(checkpoint_rates_while_loading(folder, options, optimizer, scheduler))
            if (folder / checkpoints.ANSWERED).exists():
                # Megatron would rerun the step, and end with the same code, in every attempt.
                patches.enter_context(mock.patch.object(RerunStateMachine, "validate_state_dict", return_value=False))
        try:
            result = load_checkpoint.original(model, optimizer, scheduler, load_arg, **kwargs)
        except CheckpointException as error:  # no Exception, so nobody would note it
            raise RuntimeError(f"checkpoint {source} could not be loaded: {error}") from error
    _loaded = result[0]
    if folder is not None:
        for act in after_load:
            act(folder)
    return result


def _choose(options: Namespace, source: Path) -> Path | None:
    """The folder of the checkpoint to load, None without one; the trackers name it."""
    if options.ckpt_step:
        path = checkpoints.path_of(source, options.ckpt_step)
        if wrong := integrity.find_corruption(path):
            raise ValueError(
                f"--ckpt-step {options.ckpt_step} of --load {source} is not whole: {wrong}; name another one"
            )
        return path
    iteration = integrity.newest_good(source)
    if options.non_persistent_ckpt_type == "global":
        aside = Path(options.non_persistent_global_ckpt_dir or source / NON_PERSISTENT)
        newer = _newest_not_persistent(aside)
        if newer is not None and newer >= (iteration or 0):
            return checkpoints.path_of(aside, newer)
    return None if iteration is None else checkpoints.path_of(source, iteration)


def _check_pretrained(source: Path) -> None:
    """Of another run, whose folder is only read."""
    iteration = checkpoints.tracked_iteration(source)
    wrong = iteration is not None and integrity.find_corruption(checkpoints.path_of(source, iteration))
    if wrong:
        raise ValueError(
            f"--pretrained-checkpoint {source}: the checkpoint of iteration {iteration} is not whole: {wrong}"
        )


def _newest_not_persistent(folder: Path) -> int | None:
    try:
        return integrity.newest_good(folder)
    except ValueError as error:  # often there is but one
        if dist.get_rank() == 0:
            print(f"WARNING: {error}", flush=True)
            (folder / checkpoints.TRACKER).unlink(missing_ok=True)
        dist.barrier()
        return None
