"""Atomic writes: readers see a file whole or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str, durable: bool = True) -> Path:
    """Write `text` to a temporary file and rename it to `path`, whose folder is created if missing.

    durable: sync to disk first, so that a crash after the rename cannot leave an empty file. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w") as stream:
            stream.write(text)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        return aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to report
            aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, atomically. Raises OSError.

    Not synced to disk: the heartbeat must not slow training down.
    """
    write_atomically(path, json.dumps(content, indent=1) + "\n", durable=False)
