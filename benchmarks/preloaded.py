"""A benchmark whose runs start in seconds: each is a fork of a process that has imported everything.

    python benchmarks/preloaded.py benchmarks/training.py --lengths 4096 --micro-batches 2

The script and its flags are as they are without; so are its rows. A run of pretrain_yoco.py spends 20 to 40 seconds on
imports where the disk is cold, more than on the steps that are measured. Forks are possible as long as nothing has
touched the GPU, so flash-linear-attention, which does when it is imported, is left out.
"""

import gc
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch.cuda.is_available() without a CUDA context
sys.modules["fla"] = None  # type: ignore[assignment]
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import runs
import torch

import pretrain_yoco  # noqa: F401
import yoco_megatron.model.yoco_model  # noqa: F401
from yoco_megatron.utils.ports import free_port

GRACE_S = 5  # for other processes to say why, once one has failed


def torchrun(
    processes: int, script: Sequence[str], timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess | None:
    """As `runs.torchrun`; one process that fails ends the others."""
    with tempfile.TemporaryDirectory() as folder:
        world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1), **(env or {})}
        sys.stdout.flush()
        left = {_fork(rank, script, world, Path(folder)): rank for rank in range(processes)}
        code, end = 0, time.monotonic() + timeout
        while left:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in left:
                del left[pid]
                failed = os.waitstatus_to_exitcode(status)
                if failed and not code:
                    code, end = failed, min(end, time.monotonic() + GRACE_S)
            elif time.monotonic() > end:
                for other in left:
                    os.killpg(other, signal.SIGKILL)
                for other in left:
                    os.waitpid(other, 0)
                if not code:
                    return None
                left = {}
            else:
                time.sleep(0.05)
        out, err = (_read(Path(folder), kind, processes) for kind in ("out", "err"))
        return subprocess.CompletedProcess(script, code, out, err)


def _read(folder: Path, kind: str, processes: int) -> str:
    return "".join((folder / f"{rank}.{kind}").read_text(errors="replace") for rank in range(processes))


def _fork(rank: int, script: Sequence[str], world: Mapping[str, object], folder: Path) -> int:
    """Its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for stream, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT), stream)
        os.chdir(ROOT)
        os.environ.update({name: str(value) for name, value in world.items()}, RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = list(script)
        runpy.run_path(script[0], run_name="__main__")
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
        if isinstance(done.code, str):
            print(done.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if torch.cuda.is_initialized():
        sys.exit("preloaded.py: an import has touched the GPU, so nothing can be forked: run the script itself")
    gc.freeze()
    runs.torchrun = torchrun
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
