"""Runs that are forks of a process that has imported everything."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import os, sys, time
assert "megatron.training" in sys.modules, "imported before the fork"
rank, said = int(os.environ["RANK"]), sys.argv[1]
print("rank", rank, "of", os.environ["WORLD_SIZE"], os.environ["MORE"], flush=True)
if said == "fail" and rank == 1:
    sys.exit("no memory left")
if said != "end":
    time.sleep(60)
"""
SCRIPT = """
import sys
import runs
for said in ("end", "fail", "wait"):
    done = runs.torchrun(2, [sys.argv[1], said], 20 if said != "wait" else 1, {"MORE": said})
    print(said, done and (done.returncode, done.stdout, done.stderr.strip()))
"""


@pytest.mark.slow
def test_ends_as_processes_of_their_own_do(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "benchmarks/preloaded.py", tmp_path / "script.py", tmp_path / "worker.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = [line for line in run.stdout.splitlines() if line.startswith(("end", "fail", "wait"))]
    assert said == [
        r"end (0, 'rank 0 of 2 end\nrank 1 of 2 end\n', '')",
        r"fail (1, 'rank 0 of 2 fail\nrank 1 of 2 fail\n', 'no memory left')",
        "wait None",
    ], run.stderr[-3000:]
