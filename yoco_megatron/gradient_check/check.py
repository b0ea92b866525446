"""Every parameter's gradient on a mesh of processes beside that of one process, both of the trainer itself."""

import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yoco_megatron.config.yaml_files import to_argv
from yoco_megatron.gradient_check import tiny
from yoco_megatron.gradient_check.step import Main, gradients_of_first_step
from yoco_megatron.startup.parser import build_parser, parse_flags
from yoco_megatron.utils.child_process import end_of, follow_parent, print_into
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.ports import free_port

TOLERANCE = 1e-4
"""Relative to a tensor's norm. fp32 sums in another order differ by 1e-6; a gradient that
lacks a rank's part differs by a tenth and more."""
FLOOR = 1e-5
"""A gradient smaller than this part of the whole model's, value for value, counts as that large: it may be rounding."""


@dataclass(frozen=True)
class Difference:
    """Of a parameter, or of the "loss": relative to the norm in one process, of the rank that differs most."""

    name: str
    shape: tuple[int, ...]
    error: float
    rank: int

    @property
    def is_wrong(self) -> bool:
        return not self.error <= TOLERANCE  # NaN is


def check(
    main: Main, argv: Sequence[str], data_parallel: int | None = None, timeout: float = 900.0
) -> list[Difference]:
    """One step of the model of `argv`, with tiny widths, on its mesh and in one process, on this machine's CPUs.

    Args:
        main: pretrain_yoco.py's.
        argv: its flags.
        data_parallel: ranks of it; None: as few as the mesh allows.
        timeout: seconds for either of the two.
    Returns:
        the loss and all parameters, in the order of the forward pass.
    Raises:
        ValueError: a mistake in the flags; a rank that fails or does not end, with its log.
    """
    parser = build_parser()
    args = parse_flags(list(argv), parser)
    if without := tiny.left_out(args, parser):
        print(f"left out: {', '.join(without)}", file=sys.stderr, flush=True)
    data_parallel = data_parallel or _smallest_data_parallel(args)
    world_size = data_parallel * _model_parallel(args) * args.pipeline_model_parallel_size
    on_mesh, alone = tiny.flags(args, parser, data_parallel)
    _say("the model in one process")
    (reference,) = _run(main, to_argv(alone, parser), 1, timeout)
    _say(f"the model on a mesh of {world_size}")
    results = _run(main, to_argv(on_mesh, parser), world_size, timeout)
    return compare(results, reference)


def compare(results: Sequence[dict[str, torch.Tensor]], reference: dict[str, torch.Tensor]) -> list[Difference]:
    """Each rank's gradients beside the reference's.

    Raises:
        ValueError: a parameter that only one side has.
    """
    held = {name for result in results for name in result}
    only = sorted(held ^ reference.keys())
    require(not only, f"{', '.join(only[:3])}: on one side alone, the mesh or one process")
    gradients = [one.double() for name, one in reference.items() if name != "loss"]
    typical = (sum(one.square().sum() for one in gradients) / sum(one.numel() for one in gradients)) ** 0.5
    found = []
    for name, expected in reference.items():
        norm = torch.linalg.vector_norm(expected.double())
        if name != "loss":
            norm = torch.maximum(norm, FLOOR * typical * expected.numel() ** 0.5)
        errors = {
            rank: (torch.linalg.vector_norm(result[name].double() - expected.double()) / norm).item()
            for rank, result in enumerate(results)
            if name in result
        }
        rank = max(errors, key=lambda rank: float("inf") if errors[rank] != errors[rank] else errors[rank])
        found.append(Difference(name, tuple(expected.shape), errors[rank], rank))
    return found


def _model_parallel(args: Namespace) -> int:
    """Ranks of one stage of one copy of the model."""
    return args.tensor_model_parallel_size * args.context_parallel_size


def _smallest_data_parallel(args: Namespace) -> int:
    """Experts may need more ranks than one copy of the rest has."""
    experts = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or args.tensor_model_parallel_size)
    return experts // math.gcd(experts, _model_parallel(args))


def _say(what: str) -> None:
    print(f"one step of {what}", file=sys.stderr, flush=True)


def _run(main: Main, argv: list[str], world_size: int, timeout: float) -> list[dict[str, torch.Tensor]]:
    """The gradients of each rank, each in a child of its own."""
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = ["--data-cache-path", str(folder / "cache")]
        of_all = (main, [*argv, *cache], world_size, free_port(), folder, os.getpid())
        children = [context.Process(target=_child, args=(rank, *of_all)) for rank in range(world_size)]
        for child in children:
            child.start()
        end = time.monotonic() + timeout
        try:
            _wait(children, folder, end)
        finally:
            for child in children:
                child.kill()
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _wait(children: list[Any], folder: Path, end: float) -> None:
    """Until all have ended. Raises ValueError for the first that fails, and where time is over."""
    world_size = len(children)
    while any(child.is_alive() for child in children):
        if any(child.exitcode for child in children) or time.monotonic() > end:
            break
        time.sleep(0.05)
    failed = next((rank for rank, child in enumerate(children) if child.exitcode), None)
    if failed is not None:
        said = folder / f"{failed}.error"
        why = said.read_text() if said.exists() else f"ended without a word:\n{end_of(folder / f'{failed}.log', 8)}"
        raise ValueError(f"rank {failed} of {world_size} {why}")
    running = [rank for rank, child in enumerate(children) if child.is_alive()]
    if running:
        log = end_of(folder / f"{running[0]}.log", 8)
        raise ValueError(
            f"ranks {running} of {world_size} wait for each other, or need longer: the first one's log\n{log}"
        )


def _child(rank: int, main: Main, argv: list[str], world_size: int, port: int, folder: Path, parent: int) -> None:
    follow_parent(parent)
    print_into(folder / f"{rank}.log")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    error = folder / f"{rank}.error"
    code = 1
    try:
        torch.save(gradients_of_first_step(main, argv), folder / f"{rank}.pt")
        code = 0
    except ValueError as wrong:
        error.write_text(f"refuses the flags: {wrong}")
    except BaseException:
        error.write_text(f"failed:\n{traceback.format_exc()}")
    os._exit(code)
