"""The process that writes checkpoints while training goes on; `upstream/background_writer.py` starts and feeds it.

It has neither a GPU nor more of Megatron than it needs, and lives as long as its trainer.
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from yoco_megatron.utils.child_process import follow_parent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from yoco_megatron.runtime.host_buffer import HostBuffer


class _Results:
    """In the place of the queue into which Megatron's writing functions put what the trainer has to know."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def put(self, one: Any) -> None:
        self.found.append(one)


def serve(connection: "Connection", buffer: "HostBuffer") -> None:
    """Run what the trainer puts into the buffer, one after another, until it says None.

    An exception ends this process; the trainer sees that, and its save fails.
    """
    while (place := connection.recv()) is not None:
        results = _Results()
        function, args, kwargs = buffer.load(place, left_out=results)
        function(*args, **kwargs)
        del function, args, kwargs
        connection.send(results.found)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("trainer", "connection", "buffer", "cpu_priority", "io_priority"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    follow_parent(options.trainer)  # before all that takes time
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), options.cpu_priority))

    from multiprocessing.connection import Connection

    import psutil

    from yoco_megatron.runtime.host_buffer import HostBuffer
    from yoco_megatron.startup.prepare import prepare

    if options.io_priority >= 0:
        psutil.Process().ionice(options.io_priority)
    prepare()  # what it will be given names functions of Megatron
    serve(Connection(options.connection), HostBuffer(options.buffer))


if __name__ == "__main__":
    main()
