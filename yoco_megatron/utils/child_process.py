"""Child processes of a training process: they live as long as it does, and leave signals to it."""

import ctypes
import os
import signal

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
