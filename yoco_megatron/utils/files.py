"""Atomic writes: readers see a file whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def written_atomically(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content becomes the file `path` at the end; its folder is created if missing.

    durable: sync to disk first, so that a crash after the rename cannot leave an empty file. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to report
            aside.unlink(missing_ok=True)
        raise


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
