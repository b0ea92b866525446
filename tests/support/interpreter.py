"""Triton kernels on a CPU: tested in a process of their own, as Triton reads TRITON_INTERPRET when they are defined."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str, tests: int) -> None:
    """Run the tests of `file` that need the interpreter, and see that `tests` of them passed."""
    if INTERPRETED:
        pytest.skip("this is the inner run")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(rf"\b{tests} passed", run.stdout), "the inner run lost cases"
