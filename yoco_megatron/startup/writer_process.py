"""The process that writes checkpoints while training goes on; `upstream/background_writer.py` starts and feeds it.

It has neither a GPU nor more of Megatron than it needs, and lives as long as its trainer.
"""

import argparse
import os
from multiprocessing.connection import Connection
from typing import Any

import psutil

from yoco_megatron.runtime.child_process import follow_parent
from yoco_megatron.runtime.host_buffer import HostBuffer


class _Results:
    """In the place of the queue into which Megatron's writing functions put what the trainer has to know."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def put(self, one: Any) -> None:
        self.found.append(one)


def serve(connection: Connection, buffer: HostBuffer) -> None:
    """Run what the trainer puts into the buffer, one after another, until it says None or ends.

    An exception ends this process; the trainer sees that, and its save fails.
    """
    while (place := connection.recv()) is not None:
        results = _Results()
        function, args, kwargs = buffer.load(place, left_out=results)
        function(*args, **kwargs)
        del function, args, kwargs
        connection.send(results.found)


def main() -> None:
    follow_parent()
    parser = argparse.ArgumentParser()
    for name in ("connection", "buffer", "cpu_priority", "io_priority"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), options.cpu_priority))
    if options.io_priority >= 0:
        psutil.Process().ionice(options.io_priority)
    from yoco_megatron.startup.prepare import prepare

    prepare()  # what it will be given names functions of Megatron
    serve(Connection(options.connection), HostBuffer(options.buffer))


if __name__ == "__main__":
    main()
