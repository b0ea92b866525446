"""Atomic writes: readers see a file whole or not at all. What tells whether files are the same."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def identity(files: Iterable[Path]) -> str:
    """A digest of names, sizes and times of files, which are too large to be read to know whether they changed."""
    facts = sorted((file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def written_atomically(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file `path` at the end; its folder is created if missing.

    durable: sync to disk first, so that a crash after the rename cannot leave an empty file. Raises OSError, also where
    `path` is no regular file: a rename would replace /dev/null.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file: name another one")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            aside.unlink(missing_ok=True)
        raise


def check_writable(path: Path) -> None:
    """Before work whose result goes to `path`: raises OSError where `written_atomically` would; leaves no trace of it
    but the folder."""
    trial = path.with_name(f".{path.name}.trial")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file: name another one")
    with written_atomically(trial, durable=False):
        pass
    trial.unlink()


def write_atomically(path: Path, text: str, durable: bool = True) -> Path:
    """Write `text`; see `written_atomically`. Returns `path`."""
    with written_atomically(path, durable) as stream:
        stream.write(text.encode())
    return path


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically. Raises OSError.

    Not synced to disk: the heartbeat must not slow training down.
    """
    write_atomically(path, json.dumps(content, indent=1) + "\n", durable=False)
