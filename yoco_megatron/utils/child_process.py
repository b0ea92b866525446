"""Child processes: they live as long as their parent does, leave signals to it, and print into files of their own."""

import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_parent(parent: int) -> None:
    """Call first in a child of process `parent`: die with it; ignore SIGTERM and SIGUSR1.

    SLURM sends SIGTERM to all processes of a job, and a save that the trainer then begins needs its child.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for one in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(one, signal.SIG_IGN)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def print_into(log: Path) -> None:
    """What this process prints from now on, native code's lines too, goes to a new file."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)


def end_of(log: Path, lines: int) -> str:
    """The last lines that a process printed into its file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
