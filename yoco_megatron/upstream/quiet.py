"""What Megatron prints and logs by itself: without --verbose only what matters, warnings and errors among it.

Before the first step a thousand lines come, so what passes is listed; from then on, what does not.
"""

import contextlib
import logging
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

MATTERS = re.compile(
    r"warning|error|invalid|fail|could not|cannot|unable|mismatch|ignored|not found"
    r"|\b(exiting|terminat\w+|checkpoints?)\b",
    re.IGNORECASE,
)
"""Before the first step."""
ARGUMENT = re.compile(r"  \w+ [ .]")
"""A line of the list of arguments, whose values may be any words."""
REPEATED = re.compile(
    r"^\[(?!exiting).*\] datetime: |^Overwriting rerun_state_machine|^Evaluating (on|iter) "
    r"|^\[Rank \d+\] \(.*\) memory \(MB\)"
)
"""From the first step on."""
KNOWN = re.compile(
    r"one_logger package is required|could not find the metadata file|will not load any checkpoints"
    r"|RerunStateMachine (initialized|mode)|Result validation enabled|MCore's async save is deprecated"
    r"|Unable to save \w+ indexes because path_to_cache is None|sharded_state_dict metadata loaded"
    r"|^ *checkpoint version |Rerun state will be ignored"
)
"""Warnings of what the run is meant to be like, or says itself (startup/summary.py)."""


class MegatronsOutput:
    """A text stream that leaves out lines of Megatron's code; all others, and everything else, go to `stream`."""

    def __init__(self, stream: Any, keeps_memory: bool) -> None:
        """keeps_memory: --log-memory-interval asks for its lines."""
        self._stream = stream
        self._keeps_memory = keeps_memory
        self._line = ""
        self.in_training = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Of the function that prints: the caller. A line of Megatron's is held until it is whole."""
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return self._stream.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in filter(self._passes, lines):
            self._stream.write(f"{line}\n")
        return len(text)

    def _passes(self, line: str) -> bool:
        if KNOWN.search(line):
            return False
        if self._keeps_memory and "memory (MB)" in line:
            return True
        if self.in_training:
            return not REPEATED.search(line)
        return bool(MATTERS.search(line)) and not ARGUMENT.match(line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return not KNOWN.search(record.getMessage())


LOGGERS = (
    "megatron.core.rerun_state_machine",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.datasets.gpt_dataset",
)
"""Of KNOWN: a filter holds for the records of its own logger alone."""


def begin(args: Namespace) -> None:
    """From here to `end`, as --verbose says. --logging-level and --timing-log-level ask for the log of their own."""
    if args.verbose:
        return
    sys.stdout = MegatronsOutput(sys.stdout, args.log_memory_interval is not None)
    if args.logging_level is None and "MEGATRON_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("megatron").setLevel(logging.WARNING)
    if args.timing_log_level:
        logging.getLogger("megatron.core.timers").setLevel(logging.INFO)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_worth_a_line)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """For tools that load a checkpoint: inside, as before the first step of a run."""
    begin(Namespace(verbose=False, log_memory_interval=None, logging_level=None, timing_log_level=0))
    try:
        yield
    finally:
        end()


def training_begins() -> None:
    """The first step is done."""
    if isinstance(sys.stdout, MegatronsOutput):
        sys.stdout.in_training = True


def end() -> None:
    """Standard output as before `begin`."""
    if isinstance(sys.stdout, MegatronsOutput):
        sys.stdout = sys.stdout._stream
    logging.getLogger("megatron").setLevel(logging.NOTSET)
    logging.getLogger("megatron.core.timers").setLevel(logging.NOTSET)
    for name in LOGGERS:
        logging.getLogger(name).removeFilter(_is_worth_a_line)
