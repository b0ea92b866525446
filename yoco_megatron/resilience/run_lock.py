"""One run at a time in a folder of checkpoints: a lock that outlasts neither kill -9 nor a lost node.

`run.lock` names its holder, a run's first process, in which a thread renews the file's mtime. The lock is abandoned

* where that process is gone, which can be seen on its own machine;
* where SLURM has started the same job again, or its launcher the next attempt;
* where it has not been renewed for `STALE_S`, by the file system's own clock: those of machines may differ.

It is a file that is created exclusively, which is atomic on NFS, too, where flock may not work. A process that comes
back after its lock was taken over ends at once. Plain Python, so that launchers can use it.
"""

import contextlib
import getpass
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from argparse import Namespace
from pathlib import Path
from typing import TypedDict

from yoco_megatron.resilience.exit_record import USER_ERROR, InUse, Outcome, record
from yoco_megatron.utils.small_files import BadFile, read_json

NAME = "run.lock"
BEAT_S = 10.0
STALE_S = 60.0


class Holder(TypedDict):
    """The content of a lock: who has it."""

    token: str
    machine: str
    pid: int
    started: str
    job: str
    restart: str
    attempt: str
    who: str
    since: str


UNKNOWN = Holder(
    token="", machine="", pid=0, started="", job="", restart="", attempt="", who="an unknown run", since="some time"
)
"""Of a lock that was cut short, or that another process is just writing."""


class Lock:
    """A lock that this process holds, and renews."""

    def __init__(self, path: Path, me: Holder, folder: str | None) -> None:
        self.path, self.me, self.folder = path, me, folder
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self.thread.start()

    def _renew(self) -> None:
        while not self.released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system in trouble: training will meet it
                holder = _read(self.path)
                if holder is None:
                    _create(self.path, self.me)  # removed by hand
                elif holder["token"] == self.me["token"]:
                    os.utime(self.path)
                else:
                    self._leave(holder)

    def _leave(self, other: Holder) -> None:
        reason = f"{self.path} was taken over by {_name(other)}, as it had not been renewed for {STALE_S:.0f} s"
        print(f"pretrain_yoco.py: error: {reason}", file=sys.stderr, flush=True)
        record(self.folder, Outcome("user_error", USER_ERROR, reason))
        os._exit(USER_ERROR)  # without another save

    def release(self) -> None:
        """Remove the lock, unless it is another's by now."""
        self.released.set()
        self.thread.join()
        with contextlib.suppress(OSError):
            holder = _read(self.path)
            if holder is not None and holder["token"] == self.me["token"]:
                self.path.unlink()


_held: Lock | None = None


def acquire(args: Namespace) -> None:
    """Lock the folder that a run saves to, if any, until `release`. For the run's first process.

    Raises:
        InUse: another run has it.
        ValueError: the lock cannot be written.
    """
    global _held
    release()
    if args.save is None:
        return
    flag = f"--run-folder {args.run_folder}" if args.run_folder else f"--save {args.save}"
    path, me = Path(args.save) / NAME, _me()
    try:
        while (other := _other_run(path, me)) is None:
            path.unlink(missing_ok=True)
            if _create(path, me):
                _held = Lock(path, me, args.run_folder)
                return
    except OSError as error:
        raise ValueError(f"{flag}: cannot write {path} ({error.strerror})") from error
    raise InUse(f"{flag} is in use by {_name(other)}: {_remedy(path)}")


def release() -> None:
    """Give the lock back, if this process holds one."""
    global _held
    if _held is not None and _held.me["pid"] == os.getpid():  # not in a process forked from the holder
        _held.release()
    _held = None


def in_use(folder: Path) -> str | None:
    """What keeps a run from saving to `folder`, or None. May take `STALE_S` to tell. Raises OSError."""
    other = _other_run(folder / NAME, _me())
    return other and f"{folder} is in use by {_name(other)}: {_remedy(folder / NAME)}"


def _remedy(path: Path) -> str:
    return f"wait for its end, stop it, or name another folder; if that run does not exist any more, remove {path}"


def _other_run(path: Path, me: Holder) -> Holder | None:
    """The run that holds a lock, unless the lock is abandoned; waits until that can be told."""
    first_seen, patience_ends = None, 0.0
    while True:
        holder = _read(path)
        if holder is None or _is_gone(holder, me):
            return None
        if holder["machine"] == me["machine"]:
            return holder
        try:
            renewed = path.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if first_seen is None:
            first_seen, patience = renewed, STALE_S - _age(path.parent, renewed)
            patience_ends = time.monotonic() + patience
            if patience > 0:
                print(f"{path}: waiting for a sign of life of {_name(holder)}, {patience:.0f} s", file=sys.stderr)
        if renewed != first_seen:
            return holder
        if time.monotonic() >= patience_ends:
            return None
        time.sleep(min(1.0, STALE_S / 10))


def _age(folder: Path, renewed_ns: int) -> float:
    """Seconds since a file in `folder` was written, by the clock that the file system writes with; at least 0."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{NAME}.") as probe:
        return max(0.0, (os.fstat(probe.fileno()).st_mtime_ns - renewed_ns) / 1e9)


def _is_gone(holder: Holder, me: Holder) -> bool:
    """Whether it is certain, without waiting, that the holder has ended, or is this process."""
    if holder["machine"] == me["machine"]:
        return holder["pid"] == me["pid"] or _start_of(holder["pid"]) != holder["started"]
    if not me["job"] or holder["job"] != me["job"]:
        return False
    # A launcher that only asks has no attempt of its own yet.
    return holder["restart"] != me["restart"] or ("" != me["attempt"] != holder["attempt"])


def _me() -> Holder:
    host, pid = socket.gethostname(), os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{host} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = f"{host} {uuid.uuid4()}"  # processes cannot be looked up here
    return Holder(
        token=uuid.uuid4().hex,
        machine=machine,
        pid=pid,
        started=_start_of(pid) or "",
        job=os.environ.get("SLURM_JOB_ID", ""),
        restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
        attempt=os.environ.get("YOCO_ATTEMPT", ""),
        who=f"{_user()}@{host}",
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may not know its user
        return f"user {os.getuid()}"


def _start_of(pid: int) -> str | None:
    """When a process of this machine was started, in the kernel's ticks; None if there is none, or only its remains."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _name(holder: Holder) -> str:
    job = f", SLURM job {holder['job']}" if holder["job"] else ""
    return f"{holder['who']}, process {holder['pid']}{job}, since {holder['since']}"


def _read(path: Path) -> Holder | None:
    try:
        return read_json(path, Holder, missing=None)
    except BadFile:
        return UNKNOWN


def _create(path: Path, me: Holder) -> bool:
    """Write a lock where there is none; False if there is one. Raises OSError."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w") as file:
            json.dump(me, file, indent=1)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True
