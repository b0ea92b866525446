"""A mistake that one process finds before there are process groups ends all of them.

The first one reads large files for all, and takes the run folder's lock; a machine may lack a file that others have.
Under torchrun all processes end with one. Elsewhere the others would wait in the rendezvous until it times out.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import TCPStore

from yoco_megatron.resilience.exit_record import InUse

# As what all raise what one of them raised, which another process cannot always be given.
KINDS = {"InUse": InUse, "ValueError": ValueError, "RuntimeError": RuntimeError}
TIMEOUT = timedelta(minutes=30)  # the first process may read for minutes
UNDER_TORCHRUN = "TORCHELASTIC_USE_AGENT_STORE"
SECONDS_TO_TELL = 10
_calls = itertools.count()
_stores: list[TCPStore] = []  # the server ends with its store, and process groups will use the same one


@contextlib.contextmanager
def of_all_ranks() -> Iterator[None]:
    """Inside are checks. An error of any process is raised by all, at the end; one that is no ValueError, such as a
    file system's, is a RuntimeError on the others.

    Nothing is done for a process that is alone, under torchrun, or where nothing says where the others are.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    is_known = {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= os.environ.keys()
    if world == 1 or not is_known or os.environ.get(UNDER_TORCHRUN) == "True":
        yield
        return
    rank = int(os.environ["RANK"])
    try:
        yield
    except Exception as error:
        kind = next((name for name, kind in KINDS.items() if isinstance(error, kind)), "")
        _first_error(rank, world, f"{kind}\n{error}" if kind else f"RuntimeError\nrank {rank}: {error!r}")
        raise
    found = _first_error(rank, world, "")
    if found:
        kind, text = found.split("\n", 1)
        raise KINDS[kind](text)


def tells_error() -> bool:
    """Whether this process prints the mistake that ends it: the first one does, as most mistakes are found by all.

    torchrun ends all processes as soon as one has ended. So there the others give the first one time; those that still
    live then have a mistake of their own, as where a machine lacks a file, and one on each machine prints it.
    """
    if os.environ.get("RANK", "0") == "0":
        return True
    if os.environ.get(UNDER_TORCHRUN) != "True":  # `of_all_ranks` has given the first one what this one found
        return False
    time.sleep(SECONDS_TO_TELL + int(os.environ.get("LOCAL_RANK", "0")))
    return True


def _first_error(rank: int, world: int, own: str) -> str:
    """Kind and text of the first error of all ranks, in their order; empty where there is none."""
    # As torch makes it for process groups, which share the server of this port.
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        timeout=TIMEOUT,
        wait_for_workers=False,
        multi_tenant=True,
    )
    _stores.append(store)
    key = f"yoco_megatron/checks/{next(_calls)}"
    others = range(1, world)
    if rank:
        store.set(f"{key}/{rank}", own)
        found = store.get(f"{key}/found").decode()
        store.set(f"{key}/read/{rank}", "")
        return found
    found = next(filter(None, [own, *(store.get(f"{key}/{other}").decode() for other in others)]), "")
    store.set(f"{key}/found", found)
    if found:  # the server must outlive what the others read
        store.wait([f"{key}/read/{other}" for other in others])
    return found
