"""What tests have the process that writes checkpoints do: it imports this, and neither pytest nor a test file."""

import os
import time
from pathlib import Path
from typing import Any

import torch


def double(tensor: torch.Tensor, trainer: int, results: Any) -> None:
    """Tell what the process sees, after changing its tensor."""
    tensor *= 2
    niced = os.getpriority(os.PRIO_PROCESS, 0) > os.getpriority(os.PRIO_PROCESS, trainer)
    results.put({"sum": float(tensor.sum()), "niced": niced, "gpus": os.environ["CUDA_VISIBLE_DEVICES"]})


def leave(code: int, results: Any) -> None:
    """End, as a process that is killed does, before it has told anything."""
    os._exit(code)


def write_half(write: Any, flag: str, rank: int, buckets: list, results: Any) -> None:
    """Half of each file, then stay there."""
    for path, *_ in buckets:
        Path(path).write_bytes(b"half")
    _stay(flag)


def write_all(write: Any, flag: str, *args: Any) -> None:
    """All of it, and never say so."""
    write(*args)
    _stay(flag)


def _stay(flag: str) -> None:
    Path(flag).touch()
    time.sleep(60)
