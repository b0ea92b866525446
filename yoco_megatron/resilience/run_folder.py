"""The run folder: everything that a run writes, and the records needed to repeat it.

RUN/checkpoints, tensorboard   Megatron's
RUN/checkpoints/run.lock       which run is at work here (see `run_lock`)
RUN/records/ATTEMPT/           command, resolved config, git commit and diff, packages, environment without secrets
RUN/logs/ATTEMPT/              one log per process
RUN/attempts.jsonl             one line when an attempt starts and one when it ends (see `policy`)
RUN/outcomes/ATTEMPT/          how each process ended, if it could record it (see `exit_record`)
RUN/stacks/ATTEMPT/            Python stacks of processes that hung; empty files of the others
RUN/submitted.txt              the job that submit.py submitted last
RUN/heartbeat.json             step, loss, tokens/s, written at each log interval
RUN/triggers/                  create a file `save`, `exit`, `requeue` or `profile` here to request that
RUN/profile/                   requested traces
"""

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from yoco_megatron.resilience import secrets

SUBMITTED = "submitted.txt"
# Only variables that can change what a run computes are recorded.
RECORDED = re.compile(
    r"(CUDA|NCCL|TORCH|PYTORCH|NVTE|NVIDIA|TRITON|GLOO|UCX|FI|OMP|MKL|OPENBLAS|SLURM|CUBLAS|CUDNN|YOCO|MASTER|PYTHON|"
    r"TORCHDYNAMO|TORCHINDUCTOR)(_|$)|(PATH|LD_LIBRARY_PATH|LD_PRELOAD|WORLD_SIZE|RANK|LOCAL_RANK|HOSTNAME|VIRTUAL_ENV)$"
)


def attempt() -> str:
    """The attempt that this process belongs to; launchers count them in YOCO_ATTEMPT."""
    return os.environ.get("YOCO_ATTEMPT", "0")


def rank() -> int:
    """Rank of this process, from torchrun or srun."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def make(folder: Path) -> None:
    """Make the run folder. Raises ValueError if nothing can be written there."""
    try:
        for name in ("checkpoints", "triggers"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # all ranks do this at once
    except OSError as error:
        raise ValueError(f"--run-folder {folder}: cannot write there ({error.strerror})") from None


def _git(*command: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout if done.returncode == 0 else ""


def write_records(folder: Path, argv: list[str], resolved_config: str) -> Path:
    """Write what is needed to repeat this attempt; returns the folder. Called by one process. Raises OSError."""
    records = folder / "records" / attempt()
    records.mkdir(parents=True, exist_ok=True)
    packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in metadata.distributions() if d.metadata["Name"]})
    status = _git("status", "--porcelain")
    recorded = {name: value for name, value in sorted(os.environ.items()) if RECORDED.match(name)}
    texts = {
        "command.json": json.dumps(secrets.redact_command([sys.executable, *argv])) + "\n",
        "resolved_config.yaml": secrets.redact(resolved_config),
        "git_commit.txt": (_git("rev-parse", "HEAD") or "not a git checkout\n") + status,
        "git_diff.patch": secrets.redact(_git("diff", "HEAD")),
        "packages.txt": "\n".join([f"python=={platform.python_version()}", *packages]) + "\n",
        "environment.json": json.dumps(secrets.without_secrets(recorded), indent=1) + "\n",
    }
    for name, text in texts.items():
        (records / name).write_text(text)
    return records
