"""Worlds of processes for parity tests: gloo on a CPU, NCCL on GPUs, in this process or in fresh ones.

`run_world` forks from a server that has imported Megatron once, so a world of four starts in a fraction of a second.
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

TIMEOUT_S = 240


@contextlib.contextmanager
def process_groups(
    rank: int,
    world_size: int,
    store: str | None = None,
    tp: int = 1,
    pp: int = 1,
    vp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
) -> Iterator[None]:
    """Initialise torch.distributed and Megatron's model-parallel groups, and take them down again."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        if runtime.has_gpu():
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(
            "nccl" if runtime.has_gpu() else "gloo",
            init_method=f"file://{store or os.path.join(folder, 'store')}",
            rank=rank,
            world_size=world_size,
        )
        parallel_state.initialize_model_parallel(
            tp, pp, vp, context_parallel_size=cp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
        )
        model_parallel_cuda_manual_seed(1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _server() -> Any:
    # The fork server starts as a bare Python and ignores a preload that it cannot find.
    tests = Path(__file__).resolve().parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    if runtime.has_gpu():  # CUDA does not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preload"])
    return context


def print_to(path: str, *streams: int) -> None:
    """What this process prints from now on, native code's lines too, goes to a new file; `streams`: 1 or 2, or both."""
    sys.stdout.flush()
    sys.stderr.flush()
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in streams or (1, 2):
        os.dup2(out, stream)
    os.close(out)


def _child(
    function: Callable, rank: int, world_size: int, folder: str, log: str | None, env: dict, args: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    } | env
    if log:
        print_to(f"{log}.{rank}")
    try:
        prepare()  # as any entry to the program does, and as a child of the fork server finds it
        torch.set_num_threads(1)
        torch.save(function(*args), f"{folder}/result.{rank}")
    except BaseException:
        with open(f"{folder}/error.{rank}", "w") as file:
            traceback.print_exc(file=file)
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def spawn(
    function: Callable,
    world_size: int,
    args: tuple = (),
    log: str | None = None,
    env: dict | None = None,
    timeout: float = TIMEOUT_S,
) -> list:
    """Run `function(*args)` in `world_size` fresh processes with RANK and WORLD_SIZE set; their results by rank.

    Raises:
        AssertionError: with the traceback of the first process that failed, or when the world hangs.
    """
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(target=_child, args=(function, rank, world_size, folder, log, env or {}, args))
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout)
        hung = [rank for rank, child in enumerate(children) if child.is_alive()]
        for child in children:
            child.kill()
        errors = [f"{folder}/error.{rank}" for rank in range(world_size) if os.path.exists(f"{folder}/error.{rank}")]
        assert not errors, Path(errors[0]).read_text()
        assert not hung, f"ranks {hung} still ran after {timeout} s"
        codes = [child.exitcode for child in children]
        assert codes == [0] * world_size, f"exit codes {codes}"
        return [torch.load(f"{folder}/result.{rank}", weights_only=False) for rank in range(world_size)]


def _all_cases(cases: dict[Any, tuple[Callable, dict]]) -> dict[Any, Any]:
    from megatron.core import parallel_state

    results, last = {}, None
    for name, (step, mesh) in cases.items():
        if mesh != last:
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(
                1, mesh.get("pp", 1), mesh.get("vp"), context_parallel_size=mesh.get("cp", 1)
            )
            last = mesh
        if runtime.has_transformer_engine():
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()
        try:
            results[name] = step()
        except Exception:
            results[name] = AssertionError(traceback.format_exc())
    return results


class Cases:
    """Many cases in the same processes, which take half a minute to start on a GPU.

    A case that raises fails alone; one that leaves a rank waiting ends them all.
    """

    def __init__(self, world_size: int, cases: dict[Any, tuple[Callable, dict]]) -> None:
        """cases: name -> (what each rank calls, mesh of pp, vp, cp)."""
        self.results = run_world(world_size, _all_cases, cases)

    def __getitem__(self, name: Any) -> list:
        """What each rank returned. Raises AssertionError with the traceback of the first rank that failed."""
        found = [results[name] for results in self.results]
        for result in found:
            if isinstance(result, AssertionError):
                raise result
        return found


def _in_groups(function: Callable, store: str, mesh: dict, args: tuple) -> Any:
    with process_groups(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), store, **mesh):
        return function(*args)


def run_world(world_size: int, function: Callable, *args: Any, **mesh: int | None) -> list:
    """`spawn`, inside Megatron's process groups of `mesh` (tp, pp, vp, cp, ep, etp)."""
    with tempfile.TemporaryDirectory() as folder:
        return spawn(_in_groups, world_size, (function, f"{folder}/store", mesh, args))
