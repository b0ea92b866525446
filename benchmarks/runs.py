"""Runs of pretrain_yoco.py whose logs benchmarks read."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
MOCK = "--mock-data --tokenizer-type NullTokenizer --log-interval 1 --eval-iters 0 --lr 1e-4 --lr-warmup-iters 2"


@dataclass
class Run:
    """What a training log says: seconds of the median step after the first two, peak GiB that torch allocated."""

    seconds: float
    peak_gib: float | None
    losses: list[float]
    log: str


def train(name: str, flags: str, gpus: int, timeout: int = 300, verbose: bool = False) -> Run | None:
    """Run `pretrain_yoco.py MOCK flags` on `gpus` processes; None, and a line that says why, where it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command += ["pretrain_yoco.py", *MOCK.split(), *flags.split()]
    print(f"== {name}", flush=True)
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        print(f"   did not end within {timeout} s", flush=True)
        return None
    times = [float(value) for value in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", run.stdout)]
    if run.returncode or len(times) < 3:
        errors = [line for line in run.stderr.splitlines() if re.search(r"[Ee]rror: |out of memory", line)]
        print(f"   failed: {errors[-1][:300] if errors else run.stderr[-300:]}", flush=True)
        if verbose:
            print(run.stderr[-6000:], flush=True)
        return None
    peaks = [float(value) for value in re.findall(r"max allocated: ([0-9.]+)", run.stdout)]
    losses = [float(value) for value in re.findall(r"lm loss: ([0-9.E+-]+) \|", run.stdout)]
    result = Run(median(times[2:]) / 1e3, max(peaks) / 1024 if peaks else None, losses, run.stdout)
    print(f"   {result.seconds * 1e3:,.0f} ms a step, losses {losses}", flush=True)
    return result
