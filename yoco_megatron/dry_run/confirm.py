"""The real trainer as each distinct rank of a mesh, one child process each, and whether they fit together."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from yoco_megatron.config.rules import MATRIX_OPTIMIZERS
from yoco_megatron.costs.memory import Memory, even_stages, rank_memories
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.dry_run import gpu
from yoco_megatron.dry_run.checks import mismatched_calls, off_the_formulas, uncovered
from yoco_megatron.dry_run.fake_rank import RankRecord, leave_out_flags_of_gpus, run_rank
from yoco_megatron.dry_run.mesh import Mesh
from yoco_megatron.startup.arguments import parse_for_job
from yoco_megatron.utils.child_process import end_of, follow_parent, print_into
from yoco_megatron.utils.errors import require

Main = Callable[[list[str]], None]
# Nothing of a user's is read or written: no data, no checkpoint, no logs.
NO_FILES = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--eval-iters", "0"]
FILES = ("load", "save", "run_folder", "tensorboard_dir", "data_path", "data_args_path", "train_data_path", "teacher")


@dataclass(frozen=True)
class Confirmed:
    """What the distinct ranks of a mesh did, and what is wrong with it.

    memories: of each pipeline rank, by the formulas; without: flags that need a GPU, left out; problems: one text each,
    none if all is right.
    """

    mesh: Mesh
    records: list[RankRecord]
    memories: list[Memory]
    without: list[str]
    problems: list[str]


def confirm(main: Main, argv: Sequence[str], world_size: int, jobs: int = 1) -> Confirmed:
    """Run `main`, which is pretrain_yoco.py's, with the flags `argv` as each distinct rank of so many.

    Args:
        jobs: ranks at a time; each takes one core and up to 1 GiB.
    Raises:
        ValueError: a mistake in the flags, or a rank that fails.
    """
    require(jobs >= 1, f"--jobs {jobs} must be at least 1")
    argv = [*argv, *NO_FILES]
    with gpu.defaults():
        args, plan = parse_for_job(argv, world_size)
    require(
        args.optimizer not in MATRIX_OPTIMIZERS,
        f"--optimizer {args.optimizer}: a dry run is not built for it; confirm the mesh with adam",
    )
    given = [f"--{name.replace('_', '-')}" for name in FILES if getattr(args, name, None) is not None]
    require(not given, f"{' and '.join(given)}: a dry run reads and writes no files of a run; leave it out")
    require(
        args.architecture == "yoco" or args.context_parallel_size == 1,
        f"--context-parallel-size {args.context_parallel_size}: confirm does not know the attention of a Transformer "
        "over several GPUs, which is Transformer Engine's",
    )
    without = leave_out_flags_of_gpus(args)
    shape, mesh = ModelShape.from_args(args), Mesh.from_args(args)
    stages = plan.parts() if plan else even_stages(args, shape)
    records = _run(main, argv, mesh.distinct_ranks(stages), world_size, jobs)
    problems = [
        *mismatched_calls(records),
        *off_the_formulas(records, mesh, args, shape, stages),
        *uncovered(records, mesh),
    ]
    return Confirmed(mesh, records, rank_memories(args, shape, stages), without, problems)


def _run(main: Main, argv: list[str], ranks: Sequence[int], world_size: int, jobs: int) -> list[RankRecord]:
    """Each rank in a child of its own, `jobs` at a time, in the order of `ranks`."""
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    waiting, records = list(ranks), {}
    running: dict[Connection, tuple[int, Any]] = {}
    with tempfile.TemporaryDirectory() as logs:
        while waiting or running:
            while waiting and len(running) < jobs:
                rank = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                log = Path(logs, str(rank))
                child = context.Process(target=_child, args=(main, argv, rank, world_size, theirs, log, os.getpid()))
                child.start()
                theirs.close()
                running[ours] = rank, child
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                rank, child = running.pop(ready)
                try:
                    result = ready.recv()
                except EOFError:
                    result = f"ended without an answer, perhaps for lack of memory:\n{end_of(Path(logs, str(rank)), 5)}"
                child.join()
                if isinstance(result, str):
                    for _, other in running.values():
                        other.kill()
                    raise ValueError(f"rank {rank} of {world_size} {result}")
                records[rank] = result
    return [records[rank] for rank in ranks]


def _child(main: Main, argv: list[str], rank: int, world_size: int, answer: Connection, log: Path, parent: int) -> None:
    follow_parent(parent)
    print_into(log)
    try:
        answer.send(run_rank(main, argv, rank, world_size))
    except ValueError as error:
        answer.send(f"refuses the flags: {error}")
    except BaseException:
        answer.send(f"failed:\n{traceback.format_exc()}")
    answer.close()
    os._exit(0)
