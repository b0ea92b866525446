"""The hang watchdog: a process that makes no step for too long writes its Python stacks, then is killed.

Both work while Python is stuck: faulthandler's own thread writes the stacks, a kernel timer sends SIGALRM. The
processes of a job wait for one another, so all time out within a step; the delay between stacks and SIGALRM lets each
write its stacks before the launcher kills the others.
"""

import contextlib
import faulthandler
import os
import signal
from pathlib import Path
from typing import IO

GRACE_S = 10.0
SLOW = 6  # factor on the timeout during start-up and saving


class Watchdog:
    """Write stacks after `timeout_s` without `tick`, and kill the process with SIGALRM `grace_s` later.

    SIGUSR2 writes the stacks at any time, without killing.
    """

    def __init__(self, timeout_s: float, file: Path, grace_s: float = GRACE_S) -> None:
        self.timeout_s, self.grace_s = timeout_s, grace_s
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file: IO[str] = file.open("w")
        faulthandler.register(signal.SIGUSR2, file=self.file, all_threads=True)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        os.register_at_fork(after_in_child=self.stop)

    def tick(self, patience: float = 1.0) -> None:
        """Restart the timer; the next tick may take `patience` times the timeout."""
        faulthandler.dump_traceback_later(self.timeout_s * patience, file=self.file)
        signal.setitimer(signal.ITIMER_REAL, self.timeout_s * patience + self.grace_s)

    def stop(self) -> None:
        """Stop the timer."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    @contextlib.contextmanager
    def slow(self):
        """Context in which a step may take `SLOW` times the timeout."""
        self.tick(SLOW)
        try:
            yield
        finally:
            self.tick()
