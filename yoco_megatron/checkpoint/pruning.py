"""Which old checkpoints go: --keep-checkpoints newest stay, and those that are multiples of --keep-every.

Megatron's --save-retain-interval keeps a single newest one, so that a fall-back would lose a whole retain interval.
"""

import shutil
from pathlib import Path

from yoco_megatron.checkpoint import layout as checkpoints


def surplus(iterations: list[int], newest: int, keep: int, keep_every: int | None) -> list[int]:
    """The iterations to remove, given all that are complete and the `newest` one; never newer ones than that."""
    old = sorted((one for one in iterations if one <= newest), reverse=True)[keep:]
    return [one for one in old if not (keep_every and one % keep_every == 0)]


def remove_surplus(folder: Path | str, keep: int, keep_every: int | None) -> list[int]:
    """Remove what is no longer to be kept; the iterations that were removed. Called by one process.

    Nothing is removed unless the newest one has its manifest. A file that cannot be removed stays, with a warning.
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
