"""Pruning: removes all but the newest --keep-checkpoints checkpoints and the multiples of --keep-every.

Megatron's --save-retain-interval keeps only one newest checkpoint, so that a fall-back would lose a whole interval.
"""

import shutil
from pathlib import Path

from yoco_megatron.checkpoint import layout as checkpoints


def surplus(iterations: list[int], newest: int, keep: int, keep_every: int | None) -> list[int]:
    """The iterations to remove, given all complete ones; none newer than `newest`, the tracked one."""
    old = sorted((one for one in iterations if one <= newest), reverse=True)[keep:]
    return [one for one in old if not (keep_every and one % keep_every == 0)]


def remove_surplus(folder: Path | str, keep: int, keep_every: int | None) -> list[int]:
    """Remove surplus checkpoints, and abandoned ones; returns the iterations of the former. Called by one rank.

    Nothing is removed unless the newest checkpoint has its manifest. What cannot be removed stays, with a warning.
    """
    folder = Path(folder)
    newest = checkpoints.tracked_iteration(folder)
    if newest is None or not (checkpoints.path_of(folder, newest) / checkpoints.MANIFEST).exists():
        return []
    removed = surplus(checkpoints.iterations(folder), newest, keep, keep_every)
    for iteration in removed:
        _remove(checkpoints.path_of(folder, iteration))
    remove_abandoned(folder)
    return removed


def remove_abandoned(folder: Path) -> None:
    """Remove the checkpoints from which the run has gone back (`timeline`). Called by one rank."""
    for marker in folder.glob(f"iter_*/{checkpoints.ABANDONED}"):
        _remove(marker.parent)


def _remove(path: Path) -> None:
    if path.is_symlink():
        return
    try:
        (path / checkpoints.COMPLETE).unlink(missing_ok=True)  # first: half a folder must not look like a checkpoint
        shutil.rmtree(path)
    except OSError as error:
        print(f"WARNING: old checkpoint {path} could not be removed: {error}", flush=True)
