"""The process that writes checkpoints: how calls end. tests/test_survival.py has whole runs, and their ends."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from support import in_writer
from support.worlds import process_groups

from yoco_megatron.upstream.background_writer import BackgroundWriter, get_write_results_queue


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[BackgroundWriter]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    caller = BackgroundWriter()
    with process_groups(0, 1):
        yield caller
    caller.close(abort=True)


def run(writer: BackgroundWriter, function, *args) -> object:
    """What the trainer gets to know of `function`, called with the results' queue besides."""
    queue = get_write_results_queue()
    writer.schedule_async_call(AsyncRequest(function, (*args, queue), []))
    while not writer.is_current_async_call_done():
        time.sleep(0.01)
    assert queue.qsize() == 1
    return queue.get()


def test_results_come_back(writer: BackgroundWriter) -> None:
    weights = torch.ones(3)
    found = run(writer, in_writer.double, weights, os.getpid())
    assert found == {"sum": 6.0, "niced": True, "gpus": ""} and weights.sum() == 3
    process = BackgroundWriter._process
    assert process is not None
    writer.close()
    assert process.process.returncode == 0 and BackgroundWriter._process is None


def test_a_process_that_ends_is_a_failed_write(writer: BackgroundWriter) -> None:
    """Which Megatron raises on all ranks, where it would wait for ever."""
    error = run(writer, in_writer.leave, 7)
    assert isinstance(error, RuntimeError)
    assert str(error) == "the process that writes checkpoints ended with exit code 7"


def test_a_rank_without_anything_to_write_starts_no_process(writer: BackgroundWriter) -> None:
    writer.schedule_async_call(AsyncRequest(None, (), []))
    assert writer.is_current_async_call_done() and BackgroundWriter._process is None
