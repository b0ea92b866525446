"""Integrity of checkpoints: a manifest of sizes and hashes, written last and verified before loading.

Megatron's --verify-integrity hashes everything in one process and stops at a damaged checkpoint. Here all ranks share
the work, sizes are stored beside the hashes, and a damaged checkpoint is skipped in favour of the newest whole one. The
file is Megatron's `integrity.json` with one more key, so its own check reads ours.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch.distributed as dist

from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.checkpoint import timeline
from yoco_megatron.utils.small_files import BadFile, read_json

logger = logging.getLogger(__name__)
ALGORITHM = "sha256"
THREADS = 4  # files that a rank reads at a time; hashing releases the GIL
NOTES = ".hashes_"  # and a rank: what its background writer has hashed


class _Written(TypedDict):
    """What Megatron's manifest holds."""

    algorithm: Literal["sha256"]
    files: dict[str, str]


class _Manifest(_Written, total=False):
    sizes: dict[str, int]


class _Format(TypedDict):
    """The metadata.json of a checkpoint."""

    sharded_backend: str


def write_then_hash(write: Callable, files: Iterable[Path], notes: Path, *args: Any, **kwargs: Any) -> None:
    """Call `write`, and note the hashes of the files that it made for `write_manifest`.

    In the process that writes in the background, so that training does not wait for it.
    """
    write(*args, **kwargs)
    written = [file for file in files if file.exists()]  # all of them, unless `write` has reported an error
    with ThreadPoolExecutor(THREADS) as pool:
        notes.write_text(json.dumps({file.name: found for file, found in zip(written, pool.map(_hash_of, written))}))


def notes_of_rank(path: Path) -> Path:
    """Where `write_then_hash` leaves them for this rank."""
    return path / f"{NOTES}{_world()[0]}.json"


def write_manifest(path: Path | str, extras: dict[str, str] | None = None) -> None:
    """Write the manifest of a checkpoint that all ranks have finished writing, and sync it to disk. Collective.

    Args:
        path: the checkpoint, `iter_0001000`.
        extras: small text files to add to the checkpoint, name -> text.
    Raises:
        OSError: a file cannot be read or the manifest cannot be written; raised on every rank.
    """
    path = Path(path)
    extras = extras or {}

    def list_files() -> list[str]:
        for name, text in extras.items():
            (path / name).write_text(text)
        return sorted(entry.name for entry in path.iterdir() if _is_content(entry))

    noted = _gather(_take_notes(path))
    names = run_on_rank0(list_files)
    found = noted | map_over_ranks({name: path / name for name in names if name not in noted}, _hash_of)
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
        for file in (*(path / name for name in (checkpoints.COMPLETE, *extras)), aside):  # Megatron synced the others
            _sync(file)
        aside.replace(path / checkpoints.MANIFEST)
        _sync(path)
        _sync(path.parent)

    run_on_rank0(write)


def find_corruption(path: Path | str) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole. Collective: ranks share the files, all get the answer.

    A checkpoint without a manifest (from another program) counts as whole if its metadata.json exists.
    """
    path = Path(path)

    def expected() -> dict[str, tuple[str, int | None]] | str:
        if not (path / checkpoints.COMPLETE).exists():
            return f"{checkpoints.COMPLETE} is missing: it was not written to its end"
        if (path / checkpoints.ABANDONED).exists():
            return f"the run has gone back from it, see {checkpoints.ABANDONED} there"
        try:
            read_json(path / checkpoints.COMPLETE, _Format)
        except BadFile as error:
            return f"{checkpoints.COMPLETE} cannot be read: {error}"
        if not os.path.lexists(path / checkpoints.MANIFEST):
            return {}
        try:
            manifest = read_json(path / checkpoints.MANIFEST, _Manifest)
        except BadFile as error:
            return f"{checkpoints.MANIFEST} cannot be read: {error}"
        files, sizes = manifest["files"], manifest.get("sizes", {})
        outside = [name for name in files if Path(name).name != name or "\x00" in name]
        if outside:
            return f"{checkpoints.MANIFEST} names files outside the checkpoint: {outside[0]!r:.80}"
        unlisted = sorted({entry.name for entry in path.iterdir() if _is_loaded(entry)} - files.keys())
        if unlisted:
            return f"{checkpoints.MANIFEST} lacks {unlisted[0]}"
        return {name: (digest, sizes.get(name)) for name, digest in files.items()}

    wanted = run_on_rank0(expected)
    if isinstance(wanted, str):
        return wanted
    if not wanted:
        logger.warning("checkpoint %s has no manifest: loaded unchecked", path)
        return None

    def check(file: Path) -> str | None:
        digest, size = wanted[file.name]
        if not file.is_file():
            return f"{file.name} is missing, or no file"
        if size is not None and file.stat().st_size != size:  # the cheap check first
            return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
        return None if _hash_of(file)[0] == digest else f"{file.name} is not what was written (hash differs)"

    faults = [value for value in map_over_ranks({name: path / name for name in wanted}, check).values() if value]
    return faults[0] if faults else None


def newest_good(folder: Path | str) -> int | None:
    """The iteration to load: the one in Megatron's tracker, or the newest whole one before it. Collective.

    With an unreadable tracker, as a crash can leave it, the newest whole one. The tracker is corrected.

    Returns:
        None if no checkpoint was ever completed, if the run went back to its beginning, or if the tracker says
        `release`.
    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    folder = Path(folder)
    candidates, tracked = run_on_rank0(lambda: (_candidates(folder), checkpoints.tracked_iteration(folder)))
    if tracked == timeline.BEGINNING:
        run_on_rank0(lambda: timeline.begin_anew(folder))
        return None
    if candidates is None:
        return None
    faults: list[str] = []
    for iteration in candidates:
        wrong = find_corruption(checkpoints.path_of(folder, iteration))
        if wrong is None:
            if faults or iteration != tracked:
                run_on_rank0(lambda: checkpoints.write_tracker(folder, iteration))  # noqa: B023
            if faults:
                _warn(f"falling back to the checkpoint of iteration {iteration}: {'; '.join(faults)}")
            return iteration
        faults.append(f"iteration {iteration}: {wrong}")
    if not faults:
        return None
    raise ValueError(
        f"--load {folder}: no checkpoint there is whole: {'; '.join(faults)}. "
        "Restore one, or start from the beginning in another folder"
    )


def _candidates(folder: Path) -> list[int] | None:
    """Iterations to try, newest first; None for a `release`, where there is nothing to choose."""
    if checkpoints.tracked(folder) == "release":
        return None
    tracked = checkpoints.tracked_iteration(folder)
    written = checkpoints.iterations(folder)
    if tracked is None:
        return written
    return [tracked, *(iteration for iteration in written if iteration < tracked)]


def _is_content(entry: Path) -> bool:
    return entry.is_file() and entry.name.lstrip(".") != checkpoints.MANIFEST and not entry.name.startswith(NOTES)


def _is_loaded(entry: Path) -> bool:
    """Whether loading reads the file; others may have been put there since."""
    return entry.name in (checkpoints.COMPLETE, ".metadata") or entry.suffix in (".distcp", ".pt")


def _take_notes(path: Path) -> dict[str, Any]:
    notes = notes_of_rank(path)
    if not notes.exists():
        return {}
    try:
        found = read_json(notes, dict[str, tuple[str, int]])
    except BadFile as error:  # of a process that was killed; the files are hashed again
        logger.warning("%s: passed over", error)
        found = {}
    notes.unlink()
    return found


def _hash_of(file: Path) -> tuple[str, int]:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, ALGORITHM).hexdigest(), file.stat().st_size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _warn(message: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"WARNING: {message}", flush=True)


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def run_on_rank0(function):
    """Call `function` on rank 0; all ranks return its result, or raise its OSError or ValueError. Collective."""
    rank, size = _world()
    result: list[Any] = [None, None]
    if rank == 0:
        try:
            result[0] = function()
        except (OSError, ValueError) as error:
            result[1] = error
    if size > 1:
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def map_over_ranks(files: dict[str, Path], function) -> dict:
    """name -> function(path), each file on one rank; the error as text for an unreadable file. Collective."""
    rank, size = _world()

    def result_of(name: str):
        try:
            return function(files[name])
        except OSError as error:
            return f"{name}: {error.strerror or error}"

    mine = sorted(files)[rank::size]
    with ThreadPoolExecutor(THREADS) as pool:
        return _gather(dict(zip(mine, pool.map(result_of, mine))))


def _gather(own: dict) -> dict:
    """The items of all ranks. Collective."""
    everyone: list[Any] = [own]
    if _world()[1] > 1:
        everyone = [None] * _world()[1]
        dist.all_gather_object(everyone, own)
    return {name: value for part in everyone for name, value in part.items()}
