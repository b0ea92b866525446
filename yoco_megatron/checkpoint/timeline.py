"""Going back for good: what a run saved after the checkpoint that it goes back to is never loaded again.

The tracker decides, as it is replaced in one step: `integrity.newest_good` takes the checkpoint that it names, or an
older one. Newer ones get a marker besides, with which they count as no checkpoints, before the tracker names a newer
iteration than theirs. Killed at any moment, a run has gone back or has not.
"""

from pathlib import Path

from yoco_megatron.checkpoint import layout as checkpoints

BEGINNING = 0  # in the tracker: start without a checkpoint


def go_back(folder: Path, iteration: int) -> None:
    """Abandon all checkpoints newer than `iteration`, if there are any. Called by one rank. Raises OSError."""
    written = checkpoints.iterations(folder)
    newer = [one for one in written if one > iteration]
    if not newer:
        return
    target = next((one for one in written if one <= iteration), BEGINNING)
    if checkpoints.tracked_iteration(folder) != target:
        checkpoints.write_tracker(folder, target)
    for one in newer:
        marker = checkpoints.path_of(folder, one) / checkpoints.ABANDONED
        marker.write_text(f"The run went back to iteration {iteration}. Without this file, the checkpoint counts.\n")


def begin_anew(folder: Path) -> None:
    """Carry out what BEGINNING in the tracker says: then there is neither a checkpoint nor a tracker."""
    go_back(folder, BEGINNING)
    (folder / checkpoints.TRACKER).unlink(missing_ok=True)
