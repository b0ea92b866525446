"""A suite of tasks from beginning to end: what is asked of the model, and what is written of it."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from yoco_megatron.evaluation.requests import Backend, Generate, Score, Task, Tokenizer
from yoco_megatron.evaluation.results import Folder
from yoco_megatron.utils.errors import require

LINES_EVERY = 30.0  # seconds between lines of progress in a log file


def check(tasks: Sequence[Task], tokenizer: Tokenizer, max_length: int) -> None:
    """What can be known before a model is loaded.

    Raises:
        ValueError: a task with sequences that are longer than the model's, or without any.
    """
    for task in tasks:
        try:
            longest = task.longest(tokenizer)
        except ValueError as error:
            raise ValueError(f"task {task.name}: {error}") from None
        require(
            longest <= max_length,
            f"task {task.name} has sequences of {longest:,} tokens, but the model's end at {max_length:,}: set shorter "
            "lengths in the suite, or extend the model (docs/evaluation.md)",
        )


def answers_of(backend: Backend, task: Task, requests: Sequence[Any]) -> Iterator[Any]:
    """The backend's answers to requests of the task's kind."""
    if task.kind is Generate:
        return backend.generate(requests)
    return backend.score(requests) if task.kind is Score else backend.token_losses(requests)


def evaluate(
    tasks: Sequence[Task], backend: Backend, folder: Folder, suite: str, limit: int | None = None, shows: bool = True
) -> list[dict[str, Any]]:
    """Evaluate the tasks that have no results yet, in order; every process of a mesh calls this.

    Args:
        suite: its file, for results.json.
        limit: at most so many requests of each task.
        shows: this process shows progress and writes files.
    Returns:
        The contents of the tasks' files; [] where this process writes none.
    Raises:
        ValueError: results of another model or of other settings are in the way.
    """
    found = {task.name: (folder.finished(task, limit), folder.answers(task, limit).read()) for task in tasks if shows}
    known = _agreed(found if shows else None)
    contents = []
    for task in tasks:
        content, answers = known[task.name]
        if content is None:
            started = time.monotonic()
            requests = task.requests(backend.tokenizer)[:limit]
            left = answers_of(backend, task, requests[len(answers) :])
            with folder.answers(task, limit).keeping(answers) if shows else nullcontext(lambda _: None) as keep:
                for answer in progress(left, len(requests), len(answers), task.name, shows):
                    answers.append(answer)
                    keep(answer)
            if shows:
                result = task.summarise(answers, backend.tokenizer)
                content = folder.write(task, limit, result, time.monotonic() - started, backend.name)
        elif shows:
            print(f"{task.name}: done already, kept", file=sys.stderr)
        if shows:
            contents.append(content)
            folder.write_all(suite, contents)
    return contents


def _agreed(known: dict[str, Any] | None) -> dict[str, Any]:
    """What the writing process found; the others may not see its files."""
    if not dist.is_initialized():
        assert known is not None
        return known
    shared = [known]
    dist.broadcast_object_list(shared, src=0)
    assert shared[0] is not None
    return shared[0]


def progress(answers: Iterable[Any], total: int, done: int, name: str, shows: bool) -> Iterator[Any]:
    """A bar on a terminal, else a line from time to time; `done` answers of `total` were there before."""
    if not shows:
        yield from answers
        return
    if sys.stderr.isatty():
        yield from tqdm(answers, total=total, initial=done, desc=name, unit="request")
        return
    started = told = time.monotonic()
    for number, answer in enumerate(answers, done + 1):
        now = time.monotonic()
        if number == total or now - told > LINES_EVERY:
            told = now
            print(f"{name}: {number:,} of {total:,} requests in {now - started:,.0f} s", file=sys.stderr, flush=True)
        yield answer
