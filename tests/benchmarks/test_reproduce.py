"""Every part of benchmarks/reproduce.sh has flags that its script accepts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/reproduce.sh"
PARTS = re.findall(r"^    ([\w.]+)\) ", SCRIPT.read_text(), re.MULTILINE)
# In the place of python3: the script as far as its flags are parsed.
PARSE = """
import argparse, runpy, sys

parse_args = argparse.ArgumentParser.parse_args

def stop(self, *args, **kwargs):
    parse_args(self, *args, **kwargs)
    print("parsed", sys.argv[0])
    sys.exit()

argparse.ArgumentParser.parse_args = stop
sys.argv = [word for word in sys.argv[1:] if not word.endswith("preloaded.py")]
sys.path.insert(0, "benchmarks")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, *parts: str) -> subprocess.CompletedProcess:
    (folder / "parse.py").write_text(PARSE)
    (folder / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/parse.py "$@"\n')
    (folder / "python3").chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "OUTPUT": str(folder / "rows.jsonl"), "PYTHONPATH": str(ROOT)}
    return subprocess.run([SCRIPT, *parts], env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_flags_of_all_parts(tmp_path: Path) -> None:
    done = run(tmp_path, *PARTS)
    assert len(PARTS) > 15 and done.returncode == 0 and not re.search("error|ended with", done.stderr), done.stderr
    assert done.stdout.count("\nparsed ") == len(PARTS) + 4  # `small`, `stock`, `chunks` and `mesh2fp8` run twice


def test_a_part_that_there_is_not(tmp_path: Path) -> None:
    done = run(tmp_path, "bf61")
    assert done.returncode == 2 and "no part 'bf61'" in done.stderr
