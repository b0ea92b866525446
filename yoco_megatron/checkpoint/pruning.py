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
    """Remove surplus checkpoints; returns their iterations. Called by one rank.

    Nothing is removed unless the newest checkpoint has its manifest. What cannot be removed stays, with a warning.
    """
    folder = Path(folder)
    newest = checkpoints.tracked_iteration(folder)
    if newest is None or not (checkpoints.path_of(folder, newest) / checkpoints.MANIFEST).exists():
        return []
    removed = surplus(checkpoints.iterations(folder), newest, keep, keep_every)
    for iteration in removed:
        path = checkpoints.path_of(folder, iteration)
        if path.is_symlink():
            continue
        try:
            (path / checkpoints.COMPLETE).unlink()  # first: half a folder must not look like a checkpoint
            shutil.rmtree(path)
        except OSError as error:
            print(f"WARNING: old checkpoint {path} could not be removed: {error}", flush=True)
    return removed
