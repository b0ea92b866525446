"""Cached indices of datasets: arrays of integers in .npy files, of which nothing runs."""

from pathlib import Path
from typing import Literal

import numpy as np

from yoco_megatron.utils.files import written_atomically


class DamagedIndexError(ValueError):
    """A cached index that is not whole, or no array of integers."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"--data-cache-path: {path} {why}: remove it, and it is built again")
        self.path = path


def load_index(path: str, allow_pickle: bool = False, mmap_mode: Literal["r"] = "r") -> np.ndarray:
    """A memory map of the integers in a .npy file; nothing is unpickled, whatever `allow_pickle` says.

    Raises:
        DamagedIndexError: another kind of file, or one that is not whole.
        ValueError: no such file.
    """
    try:
        found = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(
            f"--data-cache-path: {path} is missing: tools/prepare_cache.py with the flags of this run builds it, or "
            "remove --dataloader-fast-cache-load and --dataloader-defer-npy-index-mmap"
        ) from None
    except OSError:
        raise
    except Exception as error:  # numpy reads the header as Python: a damaged one raises any type
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DamagedIndexError(Path(path), f"is not a whole index ({what})") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.ndim not in (1, 2):
        raise DamagedIndexError(Path(path), "is not an array of integers")
    return found


def save_index(path: Path, index: np.ndarray) -> None:
    """Write an index that other processes see whole or not at all. Raises OSError."""
    with written_atomically(path) as stream:
        np.save(stream, index, allow_pickle=False)
