"""Every part of benchmarks/reproduce.sh has flags that its script accepts."""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.worlds import spawn

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/reproduce.sh"
PARTS = re.findall(r"^    ([\w.]+)\) ", SCRIPT.read_text(), re.MULTILINE)


class Parsed(Exception):
    """A script's flags are parsed: enough of it."""


def parse_all(calls: list[list[str]]) -> dict[str, str]:
    """Each call of a script as far as its flags are parsed; what argparse says of those that it refuses."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse_args(self, *args, **kwargs)
        raise Parsed

    argparse.ArgumentParser.parse_args = stop
    sys.path.insert(0, str(ROOT / "benchmarks"))
    refused = {}
    for words in calls:
        sys.argv = [word for word in words if not word.endswith("preloaded.py")]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        except Parsed:
            continue
        except SystemExit:
            pass
        refused[shlex.join(sys.argv)] = said.getvalue()
    return refused


def run(folder: Path, *parts: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """The script, and the calls of Python that it makes, none of which is carried out."""
    stub, calls = folder / "python3", folder / "calls"
    stub.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> {calls}\necho >> {calls}\n")
    stub.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "OUTPUT": str(folder / "rows.jsonl")}
    done = subprocess.run([SCRIPT, *parts], env=environment, capture_output=True, text=True, timeout=60)
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done, [line.split("\0")[:-1] for line in lines]


@pytest.mark.slow
def test_flags_of_all_parts(tmp_path: Path) -> None:
    done, calls = run(tmp_path, *PARTS)
    assert len(PARTS) > 15 and done.returncode == 0 and not re.search("error|ended with", done.stderr), done.stderr
    assert spawn(parse_all, 1, (calls,)) == [{}]
    assert (
        len(calls) == len(PARTS) + 10
    )  # `small`, `stock`, `llama`, `chunks`, `mesh2fp8` and those of experts run twice, `suffix` three times


def test_a_part_that_there_is_not(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "bf61")
    assert done.returncode == 2 and "no part 'bf61'" in done.stderr


def test_a_flag_that_there_is_not() -> None:
    calls = [["benchmarks/preloaded.py", "benchmarks/training.py", "--lengths", "4096", "--bf61"]]
    (refused,) = spawn(parse_all, 1, (calls,))
    assert ["unrecognized arguments: --bf61" in said for said in refused.values()] == [True]
