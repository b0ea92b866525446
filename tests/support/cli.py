"""`pretrain_yoco.py` as a user starts it, in fresh processes, and its log as data."""

import gc
import multiprocessing
import multiprocessing.util
import os
import re
import runpy
import shlex
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from support.worlds import TIMEOUT_S, print_to, spawn
from yoco_megatron.utils.ports import free_port, free_ports

_MODEL = shlex.split("""
--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --seq-length 32 --micro-batch-size 2 --global-batch-size 8
--train-iters 20 --lr 1e-2 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 3
--weight-decay 0.1 --clip-grad 1.0 --mock-data --split 90,5,5 --tokenizer-type NullTokenizer --vocab-size 255
--log-interval 1 --eval-iters 2 --eval-interval 100 --num-workers 0
""")
TINY = [*_MODEL, "--self-decoder-heads", "2"]
TINY_WINDOWS = ["--self-decoder", "sliding_window", "--self-decoder-window", "5"]
"""After TINY."""
TINY_BASELINE = [*_MODEL, "--architecture", "transformer"]


def parsed(processes: int, *flags: str) -> Namespace:
    """TINY's arguments and `flags`, as the first of so many processes parses them, the vocabulary known."""
    from yoco_megatron.startup import arguments, defaults

    args = arguments.parse([*TINY, "--save-interval", "10", *flags], processes)
    defaults.fill_in_padded_vocab_size(args)
    return args


STEP = r"\d\d-\d\d \d\d:\d\d +(\d+)/\d+"
"""The beginning of a step's line."""


@dataclass(frozen=True)
class Log:
    """What the last rank printed; figures as printed, so that equal means bitwise equal as far as a user can see."""

    losses: dict[int, str]
    """By iteration."""
    grad_norms: dict[int, str]
    validation: dict[tuple[int, str], str]
    """(iteration, 'validation' or 'test') -> loss."""
    text: str

    def loss(self, iteration: int) -> float:
        return float(self.losses[iteration])

    def of_term(self, name: str) -> dict[int, float]:
        """A part of the loss by iteration; under -1, -2, ... of each evaluation."""
        trained = re.findall(rf"{STEP} .*? {name} (\S+)", self.text)
        evaluated = re.findall(rf"loss at iteration .*?  {name} (\S+)", self.text)
        found = {int(step): float(loss) for step, loss in trained}
        assert found and evaluated, self.text[-3000:]
        return found | {-1 - at: float(loss) for at, loss in enumerate(evaluated)}


def parse(text: str) -> Log:
    """The figures of a log."""
    steps = re.findall(rf"{STEP} .*? lm loss (\S+) .*? norm (\S+) ", text)
    evaluations = re.findall(r"loss at iteration (\d+) on (\w+) set  lm loss (\S+) ", text)
    return Log(
        losses={int(step): loss for step, loss, _ in steps},
        grad_norms={int(step): norm for step, _, norm in steps},
        validation={(int(step), part): loss for step, part, loss in evaluations},
        text=text,
    )


def like_a_fresh_interpreter() -> None:
    """The data loader's workers are forked, as they are for users; a fork server's child would ask the server."""
    multiprocessing.set_start_method("fork", force=True)


def end() -> None:
    """What an interpreter does at its end, and `spawn` skips: the checkpoint writer's helper would outlive us."""
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._exit_function()


def _main(flags: list[str]) -> None:
    """`pretrain_yoco.main` as in an interpreter of its own."""
    import pretrain_yoco

    like_a_fresh_interpreter()
    try:
        pretrain_yoco.main(flags)
    except SystemExit as done:  # Megatron's way to stop at --exit-interval
        if done.code:
            raise
    finally:
        end()


def train(world_size: int, *flags: str, base: Sequence[str] = TINY, entry: Callable[[list[str]], None] = _main) -> Log:
    """Run `pretrain_yoco.main` with `base` and `flags` (a later flag wins) in `world_size` processes.

    `entry` may prepare each process before it calls `_main`.

    Raises:
        AssertionError: with the traceback of a process that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        spawn(entry, world_size, ([*base, *flags],), log=os.path.join(folder, "log"), env=rendezvous)
        return parse(Path(folder, f"log.{world_size - 1}").read_text())


def _forget_graph() -> None:
    """Megatron keeps a recorded step in its class: the next run would replay that of this run's model."""
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

    FullCudaGraphWrapper.reset_cuda_graph(None)
    StaticBufferLoader.static_buffers = {"training": [], "validation": []}


def _main_of_each(runs: dict[Any, list[str]], ports: list[int], log: str) -> dict[Any, str]:
    """`pretrain_yoco.main` for run after run, each from a clean state, on a port and with a log of its own."""
    from megatron.training.training import destroy_global_state

    import pretrain_yoco
    from support.upstream import restored

    like_a_fresh_interpreter()
    failures = {}
    for index, (name, flags) in enumerate(runs.items()):
        os.environ["MASTER_PORT"] = str(ports[index])
        print_to(f"{log}.{index}.{os.environ['RANK']}")
        try:
            with restored():  # a run without --save, for one, replaces what saves
                pretrain_yoco.main(flags)
        except (Exception, SystemExit):  # a run that fails may end the process
            failures[name] = traceback.format_exc()
        sys.stdout.flush()
        _forget_graph()
        destroy_global_state()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        gc.collect()
    end()
    return failures


class Runs:
    """Many runs of `pretrain_yoco.main` in the same processes, which take half a minute to start on a GPU.

    A run that raises everywhere fails alone; one that leaves a rank waiting ends them all.
    """

    def __init__(self, world_size: int, runs: dict[Any, Sequence[str]], timeout: float = TIMEOUT_S) -> None:
        """runs: name -> flags, in the order in which they run; `timeout` in seconds for all together."""
        with tempfile.TemporaryDirectory() as folder:
            log, env = os.path.join(folder, "log"), {"MASTER_ADDR": "127.0.0.1"}
            args = ({name: list(flags) for name, flags in runs.items()}, free_ports(len(runs)), log)
            failures = spawn(_main_of_each, world_size, args, env=env, timeout=timeout)
            self._failures = {name: text for found in failures for name, text in found.items()}
            texts = [Path(f"{log}.{index}.{world_size - 1}").read_text() for index in range(len(runs))]
            self._logs = {name: parse(text) for name, text in zip(runs, texts)}

    def __getitem__(self, name: Any) -> Log:
        """Raises AssertionError with the traceback of a rank that failed."""
        assert name not in self._failures, self._failures[name]
        return self._logs[name]


def _script(flags: list[str]) -> int:
    like_a_fresh_interpreter()
    sys.argv = ["pretrain_yoco.py", *flags]
    try:
        runpy.run_path(str(Path(__file__).parents[2] / "pretrain_yoco.py"), run_name="__main__")
    except SystemExit as done:
        return done.code
    finally:
        end()
    return 0


def run_script(
    world_size: int,
    *flags: str,
    env: dict[str, str] | None = None,
    entry: Callable[[list[str]], int] = _script,
) -> list[tuple[int, str]]:
    """(exit code, everything printed) of each of `world_size` processes that run pretrain_yoco.py as a script."""
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        log = os.path.join(folder, "log")
        codes = spawn(entry, world_size, (list(flags),), log=log, env=rendezvous | (env or {}))
        return [(code, Path(f"{log}.{rank}").read_text()) for rank, code in enumerate(codes)]


def checkpoint(folder: Path | str, iteration: int) -> dict[str, Any]:
    """All tensors (and other entries) of a checkpoint, whole, by their global names."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as aside:
        whole = os.path.join(aside, "whole.pt")
        dcp_to_torch_save(os.path.join(folder, f"iter_{iteration:07d}"), whole)
        return torch.load(whole, weights_only=False)
