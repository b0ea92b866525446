"""Names in a checkpoint folder: complete iterations, and the one that Megatron's tracker names.

Plain Python, so that launchers can use it. Megatron writes `iter_0001000/`, ending with `metadata.json`, then the
tracker.
"""

import re
from pathlib import Path

from yoco_megatron.utils.files import write_atomically
from yoco_megatron.utils.small_files import BadFile, read_text

TRACKER = "latest_checkpointed_iteration.txt"
RESOLVED = "resolved_config.yaml"  # the run's flags
COMPLETE = "metadata.json"
RELEASE = "release"  # the tracker's word, and folder, for weights without an iteration
MANIFEST = "integrity.json"  # the name and format of megatron/core/dist_checkpointing/validation.py

TRAINED = "trained_steps.json"  # how many steps changed the weights, on the way to this checkpoint
ABANDONED = "abandoned"  # marker: the run went back to an older one, see `timeline`
ANSWERED = "rerun_answered"  # marker beside what Megatron saved to rerun a step on other hardware: that is done


def path_of(folder: Path, iteration: int) -> Path:
    """The folder of one checkpoint."""
    return folder / f"iter_{iteration:07d}"


def iterations(folder: Path) -> list[int]:
    """Iterations whose checkpoint was completed and not abandoned, newest first.

    `integrity` checks whether it is still whole.
    """
    names = [
        path.name for path in folder.glob("iter_*") if (path / COMPLETE).exists() and not (path / ABANDONED).exists()
    ]
    return sorted((int(name[5:]) for name in names if re.fullmatch(r"iter_\d+", name)), reverse=True)


def format_of(path: Path) -> str | None:
    """The --ckpt-format of one checkpoint, by the names of its files; None if they are of none."""
    if (path / COMPLETE).exists():
        return "torch_dist"
    return "torch" if any(path.glob("mp_rank_*/model_optim_rng.pt")) else None


def size_of(path: Path) -> int:
    """Bytes of one checkpoint, whole or not."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file()) if path.is_dir() else 0


def tracked(folder: Path) -> str | None:
    """What Megatron's tracker says: an iteration in digits, or `release`. None if it is missing or says neither.

    So a tracker that a crash cut short counts as missing.

    Raises:
        BadFile: a folder stands in its place, so that no other can be written.
        OSError: the file system fails.
    """
    try:
        text = read_text(folder / TRACKER, missing="").strip()
    except BadFile:
        if (folder / TRACKER).is_dir():
            raise
        return None
    return text if re.fullmatch(r"[0-9]{1,18}|release", text) else None


def tracked_iteration(folder: Path) -> int | None:
    """The iteration that the tracker names; None as for `tracked`, and for a release. Raises as `tracked`."""
    text = tracked(folder)
    return None if text in (None, "release") else int(text)


def write_tracker(folder: Path, iteration: int) -> None:
    """Set the iteration to load. Raises OSError."""
    write_atomically(folder / TRACKER, str(iteration))
