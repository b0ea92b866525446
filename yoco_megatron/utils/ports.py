"""Ports to listen on, out of the range in which the system gives outgoing connections theirs.

A port of that range is free when it is asked for, and taken by one of gloo's many connections when it is used.
"""

import contextlib
import random
import socket

BELOW_EPHEMERAL = range(15_000, 30_000)
DICE = random.SystemRandom()  # a seed of the program would give two of them the same ports


def free_ports(count: int) -> list[int]:
    """So many different ones."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            held = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # taken: try another
                held.bind(("127.0.0.1", DICE.choice(BELOW_EPHEMERAL)))
                found.append(held.getsockname()[1])
        return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]
