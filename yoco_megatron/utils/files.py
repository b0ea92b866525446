"""Files that a reader sees whole or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str, durable: bool = True) -> Path:
    """Write `text` beside `path` and rename it into place, making the folder if need be: readers see all or nothing.

    durable: wait for the disk, so that a crash after the rename cannot leave an empty file.
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
        with contextlib.suppress(OSError):  # the first error says what is wrong
            aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that a reader sees all of it or what was there before. Raises OSError.

    It does not wait for the disk: the heartbeat is written while training goes on.
    """
    write_atomically(path, json.dumps(content, indent=1) + "\n", durable=False)
