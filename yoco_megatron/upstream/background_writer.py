"""Saving in the background: a process that gets a copy of a checkpoint, and writes it."""

import os
import queue
import signal
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncRequest

import yoco_megatron
from yoco_megatron.runtime.host_buffer import HostBuffer
from yoco_megatron.upstream.registry import replaces

STRATEGIES = "megatron.core.dist_checkpointing.strategies"
LEFT_TO_THE_TRAINER = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


@replaces(
    f"{STRATEGIES}.filesystem_async",
    "get_write_results_queue",
    digest="e597cbeffa89a63a",
    in_every_process=True,
    why="its queue is a helper process, which outlives a trainer that is killed, and ends before the last save at the "
    "SIGTERM that SLURM sends to all processes of a job; `BackgroundWriter` brings the results itself",
)
def get_write_results_queue(mp_mode: str = "spawn") -> queue.Queue:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    return filesystem_async._results_queue


class _Process:
    """The writer of this process's part of checkpoints."""

    def __init__(self, cpu_priority: int, io_priority: int | None) -> None:
        self.buffer = HostBuffer()
        self.connection, theirs = Pipe()
        descriptors = theirs.fileno(), self.buffer.descriptor
        numbers = (os.getpid(), *descriptors, cpu_priority, -1 if io_priority is None else io_priority)
        root = str(Path(yoco_megatron.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_TRAINER)  # which the child inherits
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "yoco_megatron.startup.writer_process", *map(str, numbers)],
                pass_fds=descriptors,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def results(self) -> list[Any]:
        """Of the call that runs, when it is done; an error where the process has ended."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return [RuntimeError(f"the process that writes checkpoints ended with exit code {self.process.wait()}")]

    def end(self, abort: bool) -> None:
        if abort:
            self.process.kill()
        elif self.process.poll() is None:
            self.connection.send(None)
        self.process.wait()
        self.connection.close()


@replaces(
    f"{STRATEGIES}.async_utils",
    "PersistentAsyncCaller",
    digest="0acf1e4fdc1eb540",
    in_every_process=True,
    why="its process asks for CUDA and holds a context; reads tensors in host memory while training changes them, and "
    "those of a GPU by CUDA IPC, which the driver's expandable segments and many containers do not allow; outlives a "
    "trainer that is killed, and ends at a SIGTERM to the whole job; and where it ends, the trainer waits for ever",
)
class BackgroundWriter(AsyncCaller):
    """One at a time: a call is copied into host memory, for which training waits, and runs in another process."""

    _process: _Process | None = None  # of the class: Megatron starts it before there is an instance

    def __init__(self) -> None:
        self._is_running = False

    @classmethod
    def _get_process(
        cls, rank: int, mp_mode: str = "spawn", cpu_priority: int = 10, io_priority: int | None = None
    ) -> _Process:
        """Start the process, if need be; `mp_mode` is Megatron's, and has no effect."""
        if BackgroundWriter._process is None:
            BackgroundWriter._process = _Process(cpu_priority, io_priority)
        return BackgroundWriter._process

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        """Copy the request, and have it run. Raises OSError without host memory for the copy."""
        if async_req.async_fn is None:
            return
        assert not self._is_running, "save_checkpoint waits for the save before"
        process = self._get_process(0)
        call = async_req.async_fn, async_req.async_fn_args, async_req.async_fn_kwargs
        place = process.buffer.store(call, left_out=get_write_results_queue())
        process.connection.send(place)
        self._is_running = True

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        """Whether it is done on all ranks, which must all ask; `blocking` waits until it is.

        Where the process has ended, the call is done, and its result an error, which Megatron then raises everywhere.
        """
        process = BackgroundWriter._process
        if self._is_running and process is not None and (blocking or process.connection.poll()):
            for result in process.results():
                get_write_results_queue().put(result)
            self._is_running = False
        return not self._is_running if no_dist else self.sync_all_async_calls(int(self._is_running))

    def close(self, abort: bool = False) -> None:
        """End the process; `abort`, though it is writing."""
        process, BackgroundWriter._process = BackgroundWriter._process, None
        self._is_running = False
        if process is not None:
            process.end(abort)

    def __del__(self) -> None:
        """Nothing: the process ends with this one."""
