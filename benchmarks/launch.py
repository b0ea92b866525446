"""A run of several processes that leaves none behind, whatever happens to it."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def torchrun(
    processes: int, script: Sequence[str], timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess | None:
    """`torchrun script` from the repository's root with its output captured; None if it did not end in `timeout` s."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.Popen(
        [*command, *script],
        cwd=ROOT,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = run.communicate(timeout=timeout)
        return subprocess.CompletedProcess(run.args, run.returncode, out, err)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # torchrun ends its workers when it is asked to end; killed, it would leave them with their GPUs.
        run.terminate()
        run.communicate()


def last_error(stderr: str) -> str:
    """The line that says why a run failed."""
    errors = [line for line in stderr.splitlines() if re.search(r"Error: .|error: .|out of memory", line)]
    return (errors[-1] if errors else stderr[-1000:]).strip()[:400]
