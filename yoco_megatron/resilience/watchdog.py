"""The hang watchdog: a process that makes no step for too long writes its Python stacks, then dies.

Both halves work while Python is stuck: the stacks come from faulthandler's own thread, the end from the kernel's timer.
The processes of a job wait for one another, so all of them time out within a step; the delay between the two halves
lets each write its stacks before the launcher kills the others.
"""

import contextlib
import faulthandler
import os
import signal
from pathlib import Path
from typing import IO

GRACE_S = 10.0
SLOW = 6  # start-up and saving may take this many times longer


class Watchdog:
    """Write stacks after `timeout_s` without `tick`, and end with SIGALRM `GRACE_S` later.

    SIGUSR2 writes the stacks at any time, without an end.
    """

    def __init__(self, timeout_s: float, file: Path, grace_s: float = GRACE_S) -> None:
        self.timeout_s, self.grace_s = timeout_s, grace_s
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = file.open("w")
        faulthandler.register(signal.SIGUSR2, file=self.file, all_threads=True)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.register_at_fork(after_in_child=self.stop)

    def tick(self, patience: float = 1.0) -> None:
        """Progress was made; the next may take `patience` times the timeout."""
        faulthandler.dump_traceback_later(self.timeout_s * patience, file=self.file)
        signal.setitimer(signal.ITIMER_REAL, self.timeout_s * patience + self.grace_s)

    def stop(self) -> None:
        """Nothing is expected any more."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def slow(self):
        """Inside, progress may take `SLOW` times the timeout."""
        self.tick(SLOW)
        try:
            yield
        finally:
            self.tick()
