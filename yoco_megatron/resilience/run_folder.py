"""The run folder: everything that a run writes, and the records needed to repeat it.

RUN/checkpoints, tensorboard   Megatron's
RUN/records/ATTEMPT/           command, resolved config, git commit and diff, packages, environment without secrets
RUN/logs/ATTEMPT/              one log per process
RUN/attempts.jsonl             one line when an attempt starts and one when it ends (see `policy`)
RUN/outcomes/ATTEMPT/          how each process ended, if it could record it (see `exit_record`)
RUN/stacks/ATTEMPT/            Python stacks of processes that hung; empty files of the others
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
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

# Flags that take a secret, and variables whose values are never recorded. Values that look like a credential or a long
# hash are hidden whatever the name.
SECRET_FLAG = re.compile(r"api[-_]key|token$|secret|password", re.IGNORECASE)
SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE|SIGNATURE|DSN|WEBHOOK", re.IGNORECASE)
CREDENTIAL = r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[a-z]-|AKIA|eyJ)[\w.-]{8,}"
SECRET_VALUE = re.compile(CREDENTIAL + r"|[0-9a-fA-F]{32,}")
URL_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")
# Only variables that can change what a run computes are recorded.
RECORDED = re.compile(
    r"(CUDA|NCCL|TORCH|PYTORCH|NVTE|NVIDIA|TRITON|GLOO|UCX|FI|OMP|MKL|OPENBLAS|SLURM|CUBLAS|CUDNN|YOCO|MASTER|PYTHON|"
    r"TORCHDYNAMO|TORCHINDUCTOR)(_|$)|(PATH|LD_LIBRARY_PATH|LD_PRELOAD|WORLD_SIZE|RANK|LOCAL_RANK|HOSTNAME|VIRTUAL_ENV)$"
)
HIDDEN = "<hidden>"


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
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--run-folder {folder}: cannot write there ({error.strerror})") from None


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a run's record may hold, with secrets hidden."""
    return {
        name: HIDDEN if SECRET_NAME.search(name) else redact(value)
        for name, value in sorted(environment.items())
        if RECORDED.match(name)
    }


def redact(text: str) -> str:
    """`text` with everything that looks like a credential hidden."""
    return URL_PASSWORD.sub(rf"\1:{HIDDEN}@", SECRET_VALUE.sub(HIDDEN, text))


def redact_command(argv: list[str]) -> list[str]:
    """A command line with the values of secret flags hidden (`--wandb-api-key X`, `--token=X`)."""
    plain, hide = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and bool(SECRET_FLAG.search(flag))
        plain.append(HIDDEN if hide else f"{flag}={HIDDEN}" if secret and equals else redact(word))
        hide = secret and not equals
    return plain


def is_secret(name: str, value: str) -> bool:
    """Whether a flag or variable surely holds a credential. A hash does not count: a path may contain one."""
    return bool((value and SECRET_FLAG.search(name)) or re.search(CREDENTIAL, value) or URL_PASSWORD.search(value))


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
    texts = {
        "command.json": json.dumps(redact_command([sys.executable, *argv])) + "\n",
        "resolved_config.yaml": redact(resolved_config),
        "git_commit.txt": (_git("rev-parse", "HEAD") or "not a git checkout\n") + status,
        "git_diff.patch": redact(_git("diff", "HEAD")),
        "packages.txt": "\n".join([f"python=={platform.python_version()}", *packages]) + "\n",
        "environment.json": json.dumps(without_secrets(os.environ), indent=1) + "\n",
    }
    for name, text in texts.items():
        (records / name).write_text(text)
    return records
