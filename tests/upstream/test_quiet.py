"""What Megatron prints by itself: lists and progress are left out, warnings and other people's lines are not."""

import contextlib
import io
import logging
import sys
from argparse import Namespace

import pytest

from yoco_megatron.upstream import quiet

ASKED = dict(verbose=False, log_memory_interval=None, logging_level=None, timing_log_level=0)


def printer(module: str):
    """A `print` that a module of this name calls."""
    space = {"__name__": module}
    exec("def show(*words, **options): print(*words, **options)", space)
    return space["show"]


@contextlib.contextmanager
def quiet_output(**asked):
    """Standard output while Megatron is quiet. Not a fixture: pytest's own capture begins after those."""
    with contextlib.redirect_stdout(io.StringIO()):
        quiet.begin(Namespace(**ASKED | asked))
        try:
            yield sys.stdout
        finally:
            quiet.end()


@pytest.fixture
def megatron():
    return printer("megatron.training.training")


def test_before_the_first_step_only_what_matters_passes(megatron):
    told = ["WARNING: TensorBoard writing requested but is not available", " loading checkpoint from X at iteration 5"]
    with quiet_output() as output:
        for line in (
            "  exit_on_missing_checkpoint ...................... False",
            "  load ............................................ /runs/warnings/checkpoints",
            "> initializing torch distributed ...",
            "WARNING: one_logger package is required to enable e2e metrics tracking",
            "WARNING: could not find the metadata file X",
            *told,
        ):
            megatron(line)
        assert output.getvalue().splitlines() == told


def test_in_training_only_what_repeats_is_left_out(megatron):
    with quiet_output() as output:
        quiet.training_begins()
        megatron("[after training is done] datetime: 2026-11-28 03:54:03 ")
        megatron("[Rank 0] (after 1 iterations) memory (MB) | allocated: 773.41")
        megatron("[exiting program at iteration 4] datetime: 2026-11-28 03:54:03 ")
        megatron("something new")
        assert [line[:8] for line in output.getvalue().splitlines()] == ["[exiting", "somethin"]


def test_lines_of_others_and_parts_of_lines(megatron):
    ours = printer("yoco_megatron.startup.record")
    with quiet_output() as output:
        megatron("an error ", end="")
        ours("mesh", "data 2")
        megatron("in", "two parts")
        assert output.getvalue() == "mesh data 2\nan error in two parts\n"
        assert output.isatty() is False and output.flush() is None


def test_log_of_megatron(caplog):
    log = logging.getLogger("megatron.core.rerun_state_machine")
    usual = "Setting RerunStateMachine mode RerunMode.DISABLED"
    with quiet_output():
        log.info("progress")
        log.warning(usual)
        log.warning("Unexpected result nan on rank 0")
    log.warning(usual)
    assert [record.getMessage() for record in caplog.records] == ["Unexpected result nan on rank 0", usual]


def test_what_is_asked_for_passes(megatron):
    with quiet_output(verbose=True) as output:
        assert isinstance(output, io.StringIO)
    memory = "[Rank 0] (after 1 iterations) memory (MB) | allocated: 773.41"
    with quiet_output(log_memory_interval=10, timing_log_level=1) as output:
        megatron(memory)
        assert output.getvalue() == f"{memory}\n"
        assert logging.getLogger("megatron.core.timers").isEnabledFor(logging.INFO)
