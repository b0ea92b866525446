"""The records in a run folder from which `policy` decides: attempts.jsonl, and how each process of an attempt ended.

A crash, a full disk or a hand may have damaged any of them. What cannot be read counts as never written, with a
warning: an attempt is worth more than its record.
"""

import json
import warnings
from pathlib import Path
from typing import Any, Literal, TypedDict

from yoco_megatron.checkpoint.layout import TRAINED
from yoco_megatron.utils.small_files import BadFile, read_json, read_json_lines

# Kinds of outcome; the first in this list that any process recorded decides for the attempt.
Kind = Literal[
    "user_error",
    "storage",
    "hardware",
    "diverged",
    "rolled_back",
    "untrained",
    "stopped",
    "finished",
    "requeue",
    "crash",
]


class _Start(TypedDict):
    event: Literal["begin"]
    attempt: int
    checkpoint: int | None


class Begin(_Start, total=False):
    """The line in attempts.jsonl of an attempt's start."""

    job: str | None
    trained_steps: int | None


class End(TypedDict):
    """The line in attempts.jsonl of an attempt's end."""

    event: Literal["end"]
    verdict: Literal["done", "stop", "requeue"]
    kind: str
    reason: str


class ExitRecord(TypedDict):
    """`RUN/outcomes/ATTEMPT/RANK.json`, which `exit_record` writes."""

    kind: Kind
    reason: str
    suspect: bool
    rank: int
    host: str
    time: float


def _attempts_file(folder: Path) -> Path:
    return folder / "attempts.jsonl"


def attempts(folder: Path) -> list[dict[str, Any]]:
    """All lines of attempts.jsonl, oldest first. Raises BadFile for one that is no file, OSError."""
    return read_json_lines(_attempts_file(folder), Begin | End)


def append_attempt(folder: Path, line: dict[str, Any]) -> None:
    """Add a line to attempts.jsonl, also after one that was cut short. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with _attempts_file(folder).open("ab+") as file:
        cut = file.tell() > 0
        if cut:
            file.seek(-1, 2)
            cut = file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(line).encode() + b"\n")


def outcomes(folder: Path, attempt: int) -> list[dict[str, Any]]:
    """How the processes of one attempt ended, as far as they could record it. Raises OSError."""
    found = []
    for path in sorted((folder / "outcomes" / str(attempt)).glob("[0-9]*.json")):
        try:
            found.append(read_json(path, ExitRecord))
        except BadFile as error:
            warnings.warn(f"{error}: passed over", stacklevel=2)
    return found


def trained_steps(checkpoint: Path) -> int:
    """Steps that changed the weights of a checkpoint, on the way to it. Raises OSError.

    Not its iteration: a run that skips every step saves, too. A checkpoint of another program counts by its iteration.
    """
    iteration = int(checkpoint.name.removeprefix("iter_"))
    try:
        return read_json(checkpoint / TRAINED, int, missing=iteration)
    except BadFile as error:
        warnings.warn(f"{error}: passed over", stacklevel=2)
        return iteration
