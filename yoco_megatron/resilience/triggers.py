"""Trigger files: `touch RUN/triggers/save` (or exit, requeue, profile) requests it for the next step.

Only rank 0 looks, at most every few seconds; upstream/resilience_hooks.py shares the requests with the other ranks,
together with signals. A file is removed when its request has been served.
"""

import time
from pathlib import Path

import torch

from yoco_megatron import runtime

SIGNAL, SAVE, EXIT = 1, 2, 4  # bits that all ranks agree on; Megatron's own signal flag is 1
REQUESTS = {"requeue": SIGNAL, "save": SAVE, "exit": EXIT}
PROFILED_STEPS = 3


class Triggers:
    """Looks at the files in `folder`/triggers every `interval_s` seconds."""

    def __init__(self, folder: Path, interval_s: float = 2.0) -> None:
        self.folder, self.interval_s = folder / "triggers", interval_s
        self.traces = folder / "profile"
        self.next_look = 0.0
        self.pending: list[Path] = []
        self.profiler: torch.profiler.profile | None = None
        self.steps_left = 0

    def poll(self) -> int:
        """All pending requests, or-ed. A profile is of this process only, and starts here."""
        if self.profiler is not None:
            self._profile_step(self.profiler)
        now = time.monotonic()
        if now < self.next_look:
            return 0
        self.next_look = now + self.interval_s
        if (self.folder / "profile").exists() and self.profiler is None:
            (self.folder / "profile").unlink(missing_ok=True)
            self._profile_start()
        self.pending = [path for name in REQUESTS if (path := self.folder / name).exists()]
        return sum(REQUESTS[path.name] for path in self.pending)

    def done(self, leaves: bool) -> None:
        """Remove the files of served requests; `leaves`: the run is about to exit (having saved)."""
        for path in self.pending:
            if path.name == "save" or leaves:
                path.unlink(missing_ok=True)
        self.pending = []

    def _profile_start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if runtime.has_gpu():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()
        self.steps_left = PROFILED_STEPS

    def _profile_step(self, profiler: torch.profiler.profile) -> None:
        self.steps_left -= 1
        if self.steps_left == 0:
            profiler.stop()
            self.traces.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.traces / f"{time.strftime('%Y%m%d-%H%M%S')}.json"))
            self.profiler = None
