"""Exit codes, and a JSON record per process of how it ended.

torchrun exits with 1 and srun with the first task's code whatever the reason was, so each process that still can writes
`RUN/outcomes/ATTEMPT/RANK.json`; `policy` reads all of them.
"""

import argparse
import contextlib
import errno
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from yoco_megatron.resilience import run_folder, secrets
from yoco_megatron.utils.files import write_json

USER_ERROR = 2
STORAGE = 74  # sysexits' EX_IOERR

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
# Paths that no attempt can use: too long, a folder where a file must be, a link to itself.
NO_FILES = {errno.ENAMETOOLONG, errno.EISDIR, errno.ELOOP}


class InUse(ValueError):
    """Another run is at work in the folder: nothing may be written there, no record either."""


@dataclass(frozen=True)
class Outcome:
    """How one process ended; `kind` is one of `records.Kind`."""

    kind: str
    code: int
    reason: str
    iteration: int | None = None
    suspect: bool = False
    """True: this process's own hardware computed a wrong result."""


def record(folder: str | Path | None, outcome: Outcome) -> None:
    """Write `outcome` into the run folder, if any. OSErrors are ignored: a full disk must not hide its cause."""
    if folder is None:
        return
    path = Path(folder) / "outcomes" / run_folder.attempt() / f"{run_folder.rank()}.json"
    with contextlib.suppress(OSError):
        where = {"rank": run_folder.rank(), "host": host(), "time": time.time()}
        write_json(path, asdict(outcome) | where)


def host() -> str:
    """SLURM's name of this node, or its hostname."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record_exception(argv: list[str], error: Exception) -> Outcome:
    """Record the exception that ended a process, in the run folder of its command line; returns its outcome."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--run-folder")
    how = of_exception(error)
    if not isinstance(error, InUse):
        record(flags.parse_known_args(argv)[0].run_folder, how)
    return how


def of_exception(error: BaseException) -> Outcome:
    """The outcome of a process that an exception ended."""
    reason = secrets.redact(f"{type(error).__name__}: {error}".split("\n", 1)[0])[:500]
    if storage_error(error):
        return Outcome("storage", STORAGE, reason)
    no_file = isinstance(error, OSError) and error.errno in NO_FILES
    if no_file or (isinstance(error, ValueError) and not isinstance(error, UnicodeError)):
        return Outcome("user_error", USER_ERROR, reason)
    return Outcome("crash", 1, reason)


def storage_error(error: BaseException | None) -> bool:
    """Whether a full, read-only or over-quota file system caused `error`, however it is wrapped."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        one = queue.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno in STORAGE_ERRORS:
            return True
        # torch's CheckpointException holds {rank: (exception, traceback)}
        failures = getattr(one, "failures", None)
        if isinstance(failures, dict):
            queue += [failure[0] for failure in failures.values()]
        queue += [one.__cause__, one.__context__, *(a for a in one.args if isinstance(a, BaseException))]
    return False
