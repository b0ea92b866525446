"""--evaluate-suite: the tasks of a suite between steps of training, on the training's own mesh and model.

Results go to the log, to TensorBoard and wandb as evaluation/TASK/METRIC, and to

    RUN/evaluation/in_training/iter_ITERATION.json    of --run-folder RUN or --save RUN/checkpoints

Training does not notice: see upstream/between_steps.py.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.training import get_args, get_tokenizer

from yoco_megatron.convert import tokenizer_files
from yoco_megatron.data.document_ends import document_start
from yoco_megatron.data.tokenizer import local_path
from yoco_megatron.evaluation import driver
from yoco_megatron.evaluation.backends.mesh import MeshBackend
from yoco_megatron.evaluation.requests import Result, Task
from yoco_megatron.evaluation.results import plain, run_folder
from yoco_megatron.evaluation.suite import read_suite
from yoco_megatron.evaluation.tokenizer import TextTokenizer
from yoco_megatron.startup import agreement
from yoco_megatron.upstream import between_steps, throughput
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.files import write_json

FOLDER = Path("evaluation", "in_training")


@agreement.of_all_ranks()
def prepare(args: Namespace) -> None:
    """Build the tasks of --evaluate-suite, if it is given, so that training evaluates them. Megatron's globals are set.

    Raises:
        ValueError: a suite that cannot be read, sequences longer than --seq-length, or no tokenizer for text.
    """
    if args.evaluate_suite is None:
        return
    tasks = read_suite(Path(args.evaluate_suite))
    tokenizer = _tokenizer(args)
    try:
        driver.check(tasks, tokenizer, args.seq_length)
        suite = [(task, task.requests(tokenizer)) for task in tasks]
    except ValueError as error:
        raise ValueError(f"--evaluate-suite {args.evaluate_suite}: {error}") from None

    def evaluate(model: Sequence[torch.nn.Module], iteration: int) -> None:
        # What a step has room for, backward pass included, an evaluation has.
        tokens = args.micro_batch_size * args.seq_length
        _evaluate(suite, MeshBackend(model, tokenizer, args.seq_length, tokens, tokenizer.rows), iteration)

    between_steps.at_evaluation[:] = [evaluate]


def _tokenizer(args: Namespace) -> TextTokenizer:
    """That of the run, as tasks see it."""
    folder = local_path(args.tokenizer_model) if args.tokenizer_type == "HuggingFaceTokenizer" else None
    require(
        folder is not None and folder.is_dir(),
        f"--evaluate-suite {args.evaluate_suite}: tasks are of text, and need --tokenizer-type HuggingFaceTokenizer "
        "with a folder as --tokenizer-model",
    )
    assert folder is not None
    return TextTokenizer(tokenizer_files.load(folder, document_start(args, get_tokenizer())))


def _evaluate(suite: Sequence[tuple[Task, Sequence[Any]]], backend: MeshBackend, iteration: int) -> None:
    """The process that has Megatron's writers scores the answers, which all have."""
    started = time.monotonic()
    reports = dist.get_rank() == dist.get_world_size() - 1
    results = {}
    for task, requests in suite:
        answers = [answer for answer in driver.answers_of(backend, task, requests) if reports]
        if reports:
            with _warning(f"{task.name} at iteration {iteration}: no result"):
                results[task.name] = task.summarise(answers, backend.tokenizer)
    if reports:
        _report(results, iteration, time.monotonic() - started)


def _report(results: dict[str, Result], iteration: int, seconds: float) -> None:
    args = get_args()
    metrics = {f"{task}/{name}": value for task, one in results.items() for name, value in one.metrics.items()}
    shown = " | ".join(f"{name}: {value:.6g}" for name, value in metrics.items())
    print(f" evaluation at iteration {iteration} | {shown} | {seconds:.1f} s", flush=True)
    throughput.write_scalars({f"evaluation/{name}": value for name, value in metrics.items()}, iteration)
    if args.save is None:
        return
    path = run_folder(args.save) / FOLDER / f"iter_{iteration:07d}.json"
    about = {"suite": args.evaluate_suite, "iteration": iteration, "seconds": seconds}
    about |= {"tokens": args.consumed_train_samples * args.seq_length}
    tasks = {task: asdict(replace(result, records=[])) for task, result in results.items()}
    with _warning(f"{path} could not be written"):
        write_json(path, plain(about | {"tasks": tasks}))


@contextmanager
def _warning(what: str) -> Iterator[None]:
    """A file that is gone or a file system in trouble does not end the run before it must save."""
    try:
        yield
    except (OSError, ValueError) as error:
        print(f"warning: {what}: {error}", file=sys.stderr, flush=True)
