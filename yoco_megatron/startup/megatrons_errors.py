"""What Megatron finds wrong with arguments, as one error that names the flags."""

import argparse
import contextlib
import linecache
import re
import traceback
from collections.abc import Iterator
from types import TracebackType


@contextlib.contextmanager
def as_value_errors(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[None]:
    """Inside, whatever is raised about the arguments is a ValueError. Failing disks stay what they are.

    Args:
        parser: whose flags the error may name.
    """
    try:
        yield
    except (OSError, ValueError, MemoryError, KeyboardInterrupt):
        raise
    except SystemExit as error:  # some retired flags: a line on the screen, and exit code 0
        raise ValueError("Megatron refuses these arguments: see the line above") from error
    except Exception as error:
        raise ValueError(_told(error, args, parser)) from error


def _told(error: Exception, args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Megatron's message, or its condition where there is none, behind the flags of the statement that raised it."""
    statement = _statement(error.__traceback__)
    condition = re.sub(r"^assert\s+", "", statement)
    if isinstance(error, AssertionError):
        told = str(error) or f"Megatron needs {condition}"
    else:
        told = f"Megatron cannot use these arguments ({type(error).__name__}: {error})"
    flags = {action.dest: action.option_strings[0] for action in parser._actions}
    if any(flag in told for flag in flags.values()):
        return told
    named = dict.fromkeys(re.findall(r"\b(?:args|self|config)\.(\w+)", condition))
    given = [f"{flags[dest]} {getattr(args, dest, None)}" for dest in named if dest in flags]
    return f"{', '.join(given)}: {told}" if given else told


def _statement(trace: TracebackType | None) -> str:
    """The source of the statement that raised, on one line."""
    place = traceback.extract_tb(trace)[-1]
    lines = range(place.lineno or 0, (place.end_lineno or place.lineno or 0) + 1)
    return " ".join(linecache.getline(place.filename, number).strip() for number in lines)
