"""Checkpoints that are known to be whole: a manifest written last, checked before anything is loaded.

Megatron can do both (--verify-integrity), one process hashing everything, and stops at a bad checkpoint. Here all
processes share the work, sizes are kept beside the hashes, and a bad checkpoint is passed over for the newest good one.
The file is Megatron's `integrity.json` with one more key, so its own check reads ours.
"""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from yoco_megatron.checkpoint import layout as checkpoints

logger = logging.getLogger(__name__)
ALGORITHM = "sha256"
THREADS = 4  # a process reads this many files at a time; hashing releases the interpreter


def seal(path: Path | str, extras: dict[str, str] | None = None) -> None:
    """Write the manifest of a checkpoint that all processes have finished writing, and make it durable. Collective.

    Args:
        path: the checkpoint, `iter_0001000`.
        extras: small text files to add to it, by name.
    Raises:
        OSError: a file cannot be read or the manifest not be written, on every process.
    """
    path = Path(path)
    extras = extras or {}

    def list_files() -> list[str]:
        for name, text in extras.items():
            (path / name).write_text(text)
        return sorted(entry.name for entry in path.iterdir() if _counts(entry))

    names = agree(list_files)
    found = _shared({name: path / name for name in names}, _hash_of)
    errors = [value for value in found.values() if isinstance(value, str)]
    if errors:
        raise OSError(f"checkpoint {path} cannot be read back after it was written: {errors[0]}")

    def write() -> None:
        manifest = {
            "algorithm": ALGORITHM,
            "files": {name: found[name][0] for name in names},
            "sizes": {name: found[name][1] for name in names},
        }
        aside = path / f".{checkpoints.MANIFEST}"
        aside.write_text(json.dumps(manifest, indent=1) + "\n")
        for written in (*(path / name for name in (checkpoints.COMPLETE, *extras)), aside):  # others are synced
            _sync(written)
        aside.replace(path / checkpoints.MANIFEST)
        _sync(path)
        _sync(path.parent)

    agree(write)


def fault(path: Path | str) -> str | None:
    """What is wrong with a checkpoint, None if nothing. Collective: processes share the files and agree.

    A checkpoint without a manifest, written by something else, is taken for good if it was written to its end.
    """
    path = Path(path)

    def expected() -> dict[str, tuple[str, int | None]] | str:
        if not (path / checkpoints.COMPLETE).exists():
            return f"{checkpoints.COMPLETE} is missing: it was not written to its end"
        if not (path / checkpoints.MANIFEST).exists():
            return {}
        try:
            manifest = json.loads((path / checkpoints.MANIFEST).read_text())
            sizes = manifest.get("sizes", {})
            return {name: (digest, sizes.get(name)) for name, digest in manifest["files"].items()}
        except (ValueError, KeyError, AttributeError, OSError) as error:
            return f"{checkpoints.MANIFEST} cannot be read: {error}"

    wanted = agree(expected)
    if isinstance(wanted, str):
        return wanted
    if not wanted:
        logger.warning("checkpoint %s has no manifest: loaded unchecked", path)
        return None

    def check(file: Path) -> str | None:
        digest, size = wanted[file.name]
        if size is not None and file.stat().st_size != size:  # the cheap check first
            return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
        return None if _hash_of(file)[0] == digest else f"{file.name} is not what was written (hash differs)"

    faults = [value for value in _shared({name: path / name for name in wanted}, check).values() if value]
    return faults[0] if faults else None


def newest_good(folder: Path | str) -> int | None:
    """The iteration to load: the one that Megatron's tracker names, or the newest before it that is whole. Collective.

    An unreadable tracker, as a crash can leave it, stands for the newest. The tracker is corrected.

    Returns:
        None where no checkpoint was ever finished, or where the tracker says `release`.
    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    folder = Path(folder)
    candidates, tracked = agree(lambda: (_candidates(folder), checkpoints.tracked_iteration(folder)))
    if candidates is None:
        return None
    faults = []
    for iteration in candidates:
        wrong = fault(checkpoints.path_of(folder, iteration))
        if wrong is None:
            if faults or iteration != tracked:
                agree(lambda: checkpoints.write_tracker(folder, iteration))  # noqa: B023
            if faults:
                _say(f"falling back to the checkpoint of iteration {iteration}: {'; '.join(faults)}")
            return iteration
        faults.append(f"iteration {iteration}: {wrong}")
    if not faults:
        return None
    raise ValueError(
        f"--load {folder}: no checkpoint there is whole: {'; '.join(faults)}. "
        "Restore one, or remove the folder to start from the beginning"
    )


def _candidates(folder: Path) -> list[int] | None:
    """Iterations to try, newest first; None where there is nothing for us to choose."""
    tracker = folder / checkpoints.TRACKER
    tracked = checkpoints.tracked_iteration(folder)
    if tracker.exists() and tracked is None and tracker.read_text().strip() == "release":
        return None
    written = checkpoints.iterations(folder)
    if tracked is None:
        return written
    return [tracked, *(iteration for iteration in written if iteration < tracked)]


def _counts(entry: Path) -> bool:
    return entry.is_file() and entry.name.lstrip(".") != checkpoints.MANIFEST


def _hash_of(file: Path) -> tuple[str, int]:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, ALGORITHM).hexdigest(), file.stat().st_size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say(message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"WARNING: {message}", flush=True)


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(function):
    """What `function` returns on the first process, on all of them; its OSError too."""
    rank, size = _world()
    result = [None, None]
    if rank == 0:
        try:
            result[0] = function()
        except OSError as error:
            result[1] = error
    if size > 1:
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def _shared(files: dict[str, Path], function) -> dict:
    """name -> function(path), each file read by one process; for a file that cannot be read, the error as text."""
    rank, size = _world()

    def tried(name: str):
        try:
            return function(files[name])
        except OSError as error:
            return f"{name}: {error.strerror or error}"

    mine = sorted(files)[rank::size]
    with ThreadPoolExecutor(THREADS) as pool:
        own = dict(zip(mine, pool.map(tried, mine)))
    everyone = [own]
    if size > 1:
        everyone = [None] * size
        dist.all_gather_object(everyone, own)
    return {name: value for part in everyone for name, value in part.items()}
