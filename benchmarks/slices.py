"""Training runs in slices: as many at once as there are GPUs, until a time is over; another call goes on.

At the end of a slice each run is asked for a checkpoint by the trigger file of its run folder, and the next slice
starts from it.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from runs import ROOT, last_error

from yoco_megatron.checkpoint.layout import tracked_iteration

SHORTEST = 45.0  # seconds: a slice of a run is not worth starting for less
SAVING = 50.0  # seconds that a run has to save and end
LOG = "train.log"


@dataclass(frozen=True)
class Job:
    """A training run in a folder of its own, with the flags that say what is trained and for how many steps."""

    folder: Path
    flags: tuple[str, ...]
    steps: int

    @property
    def name(self) -> str:
        return self.folder.name

    def reached(self) -> int:
        """The step of its checkpoint."""
        return tracked_iteration(self.folder / "checkpoints") or 0

    def done(self) -> bool:
        """Whether it was trained and evaluated to its end."""
        return (self.folder / "done").exists()


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Of what and how runs are made; they lie in runs/`name`."""
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / name, help="of text and runs")
    parser.add_argument("--text", type=Path, help="folder of text; default: the site-packages of this Python")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--size", default="160m", help="a size of configs/model")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--flags", default="", help="more flags for every run")
    parser.add_argument("--gpus", type=int, default=1, help="runs at a time, one on each; 0: the CPU")
    parser.add_argument(
        "--runs-per-gpu", type=int, default=1, help="more hide each other's start, saves and evaluation"
    )
    parser.add_argument("--seconds", type=float, default=530, help="of a slice, and a minute more to save")


def gpus_of(options: argparse.Namespace) -> list[str | None]:
    """The GPU of each run at a time; None: the CPU."""
    return [str(gpu) for gpu in range(options.gpus)] * options.runs_per_gpu or [None]


def run_slice(jobs: Callable[[], list[Job]], gpus: list[str | None], seconds: float) -> bool:
    """Work on the jobs for so many seconds; returns whether all are done. Raises SystemExit if a run failed.

    Args:
        jobs: all of them, most urgent first; asked again whenever one has ended, as results may make new ones.
        gpus: the GPU of each run at a time.
    """
    end = time.monotonic() + seconds
    state = threading.Condition()
    taken: set[Path] = set()
    failed: list[str] = []
    running = 0

    def work(gpu: str | None) -> None:
        nonlocal running
        while end - time.monotonic() > SHORTEST:
            with state:
                job = next((job for job in jobs() if not job.done() and job.folder not in taken), None)
                if job is None and not running:
                    return
                if job is None:
                    state.wait(timeout=2.0)  # the result of another may make a job
                    continue
                taken.add(job.folder)
                running += 1
            try:
                if not _run(job, gpu, end):
                    failed.append(job.name)
            finally:
                with state:
                    running -= 1
                    state.notify_all()

    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the next slice tries them again")
    return all(job.done() for job in jobs())


def evaluate_slice(evaluations: dict[str, list[str]], gpus: list[str | None], seconds: float) -> list[bool]:
    """Run tools/evaluate.py with each of these lists of flags, by name; returns which are done. Another call goes on.

    Args:
        gpus: the GPU of each at a time.
    """
    end = time.monotonic() + seconds
    free: Queue[str | None] = Queue()
    for gpu in gpus:
        free.put(gpu)

    def one(name: str) -> bool:
        gpu = free.get()
        try:
            left = max(1.0, end - time.monotonic())
            command = [sys.executable, "tools/evaluate.py", *evaluations[name]]
            run = subprocess.run(command, cwd=ROOT, env=_on(gpu), capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{name}: not done; what is done is kept: repeat this command", flush=True)
            return False
        finally:
            free.put(gpu)
        print(f"{name}\n{run.stdout if run.returncode == 0 else last_error(run.stderr)}", flush=True)
        return run.returncode == 0

    with ThreadPoolExecutor(len(gpus)) as pool:
        return list(pool.map(one, evaluations))


def _on(gpu: str | None) -> dict[str, str]:
    """The environment of a process on a GPU."""
    return os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})


def _run(job: Job, gpu: str | None, end: float) -> bool:
    """Train until the job is done or the slice over; returns False for a run that fails, which is told."""
    job.folder.mkdir(parents=True, exist_ok=True)
    trigger = job.folder / "triggers/exit"
    trigger.unlink(missing_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {job.name}: from step {job.reached()} of {job.steps}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    folders = {"--save": "checkpoints", "--load": "checkpoints", "--tensorboard-dir": "tensorboard"}
    command += ["pretrain_yoco.py", *job.flags, "--run-folder", str(job.folder), "--keep-checkpoints", "1"]
    command += [word for flag, name in folders.items() for word in (flag, str(job.folder / name))]
    command += ["--data-cache-path", str(job.folder / "cache"), "--train-iters", str(job.steps)]
    with (job.folder / LOG).open("ab") as log:
        at = log.tell()
        run = subprocess.Popen(command, cwd=ROOT, env=_on(gpu), stdout=log, stderr=log)
        try:
            code = run.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            trigger.parent.mkdir(exist_ok=True)
            trigger.touch()
            try:
                code = run.wait(timeout=SAVING)
            except subprocess.TimeoutExpired:
                run.terminate()  # torchrun ends its worker
                run.wait()
                code = 1
        except BaseException:
            run.terminate()
            run.wait()
            raise
    if code == 0 and job.reached() >= job.steps:
        (job.folder / "done").touch()
    elif code:
        with (job.folder / LOG).open("rb") as log:
            log.seek(at)
            print(f"{job.name} failed: {last_error(log.read().decode(errors='replace'))}", flush=True)
    print(f"{time.strftime('%H:%M:%S')} {job.name}: at step {job.reached()} of {job.steps}", flush=True)
    return code == 0
