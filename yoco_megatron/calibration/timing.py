"""Seconds of work that is repeated long enough for a GPU to be as warm as in training."""

import time
from collections.abc import Callable

import torch

from yoco_megatron import runtime

WARM_UP = 2  # calls: kernels compile, workspaces appear


def seconds(run: Callable[[], object], at_least: float) -> float:
    """Of one call, in the mean of as many as last `at_least` seconds after those that warm up."""
    for _ in range(WARM_UP):
        run()
    once = _of(run, 1)
    return _of(run, max(1, round(at_least / once)))


def _of(run: Callable[[], object], calls: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - start) / calls


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if runtime.has_gpu():
        torch.cuda.synchronize()
