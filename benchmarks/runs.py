"""Runs of several processes, and those of pretrain_yoco.py whose logs benchmarks read."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
MOCK = "--mock-data --tokenizer-type NullTokenizer --log-interval 1 --eval-iters 0 --lr 1e-4 --lr-warmup-iters 2"


@dataclass
class Run:
    """What a training log says: seconds of the median step of the second half, peak GiB that torch allocated.

    The first half warms up: kernels are compiled, chosen and loaded for about five steps.
    """

    seconds: float
    peak_gib: float | None
    losses: list[float]
    log: str


OUT_OF_MEMORY = "out of memory|CUBLAS_STATUS_ALLOC_FAILED"


@dataclass
class Failure:
    """A run that did not end well, and why."""

    reason: str

    @property
    def out_of_memory(self) -> bool:
        return re.search(OUT_OF_MEMORY, self.reason) is not None


def attempt(
    name: str,
    flags: str,
    gpus: int,
    timeout: int = 300,
    verbose: bool = False,
    data: str = MOCK,
    env: Mapping[str, str] | None = None,
    script: str = "pretrain_yoco.py",
) -> Run | Failure:
    """Run `script data flags` on `gpus` processes; `verbose` shows the log where it fails."""
    print(f"== {name}", flush=True)
    run = torchrun(gpus, [script, "--verbose", *data.split(), *flags.split()], timeout, env)
    if run is None:
        failure = Failure(f"did not end within {timeout} s")
        print(f"   {name} {failure.reason}", flush=True)
        return failure
    times = [float(value) for value in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", run.stdout)]
    if run.returncode or len(times) < 3:
        failure = Failure(last_error(run.stderr) or f"{len(times)} steps, exit code {run.returncode}")
        print(f"   {name} failed: {failure.reason}", flush=True)
        if verbose and not failure.out_of_memory:
            print(f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}", flush=True)
        return failure
    peaks = [float(value) for value in re.findall(r"max allocated: ([0-9.]+)", run.stdout)]
    losses = [float(value) for value in re.findall(r"lm loss: ([0-9.E+-]+) \|", run.stdout)]
    result = Run(median(times[len(times) // 2 :]) / 1e3, max(peaks) / 1024 if peaks else None, losses, run.stdout)
    shown = [f"{value:.4g}" for value in (losses if len(losses) < 20 else [*losses[:3], *losses[-3:]])]
    print(
        f"   {name}: {result.seconds * 1e3:,.1f} ms a step, first steps {times[:8]}, losses {' '.join(shown)}",
        flush=True,
    )
    return result


def train(name: str, flags: str, gpus: int, timeout: int = 300, verbose: bool = False, **env: str) -> Run | None:
    """As `attempt` with mock data; None where the run fails."""
    run = attempt(name, flags, gpus, timeout, verbose, env=env)
    return run if isinstance(run, Run) else None


def device_name(gpus: int) -> str:
    """What `gpus` processes run on. By nvidia-smi: a CUDA context here would take memory from every run."""
    from yoco_megatron.resilience.preflight import nvidia_smi

    found = nvidia_smi()
    return f"{gpus}x {found[0]['name']}" if found else f"{gpus} CPU processes"


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
    """The line that says why a run failed; a lack of memory explains whatever else went wrong."""
    lines = stderr.splitlines()
    errors = [line for line in lines if re.search(OUT_OF_MEMORY, line)]
    errors = errors or [line for line in lines if re.search(r"Error: .|error: .|Error$", line)]
    return (errors[-1] if errors else stderr[-1000:]).strip()[:400]
