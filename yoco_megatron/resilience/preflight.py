"""Checks whether a node is fit for training. Run once per node, before training:

    python -m yoco_megatron.resilience.preflight RUN --gpus 8 --min-tflops 400 --min-allreduce-gbps 100

Queries the GPUs (number, uncorrected memory errors, memory in use), checks the disk space for one checkpoint, then
times a matmul on each GPU and an all-reduce over all GPUs of the node, to find slow ones. Writes
RUN/preflight/ATTEMPT/NODE.json, and NODE.bad with the node's name if it is unfit. Without a GPU the same runs on the
CPU. Exit code 3: unfit.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.resilience import exit_record, run_folder
from yoco_megatron.utils.files import write_json

UNFIT = 3
GIB = 1 << 30


def nvidia_smi() -> list[dict[str, str]]:
    """Index, name, memory and errors of each GPU; [] without a driver."""
    fields = ["index", "name", "memory.used", "memory.total", "ecc.errors.uncorrected.volatile.total"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, map(str.strip, line.split(",")))) for line in done.stdout.splitlines() if line.strip()]


def gpu_faults(gpus: list[dict[str, str]], expected: int, max_used_mib: float) -> list[str]:
    """What is wrong with the GPUs, from nvidia-smi's report."""
    faults = [f"{len(gpus)} GPUs instead of {expected}"] if len(gpus) != expected else []
    for gpu in gpus:
        errors = gpu["ecc.errors.uncorrected.volatile.total"]
        if errors.isdigit() and int(errors):
            faults.append(f"GPU {gpu['index']} has {errors} uncorrected memory errors")
        if gpu["memory.used"].isdigit() and float(gpu["memory.used"]) > max_used_mib:
            faults.append(f"GPU {gpu['index']} has {gpu['memory.used']} MiB in use by something else")
    return faults


def checkpoint_bytes(folder: Path) -> int:
    """Size of the newest checkpoint in bytes, 0 if there is none."""
    newest = checkpoints.iterations(folder / "checkpoints")[:1]
    return sum(checkpoints.size_of(checkpoints.path_of(folder / "checkpoints", one)) for one in newest)


def disk_faults(folder: Path, min_free_gib: float) -> list[str]:
    """What is wrong with the disk: [] if one more checkpoint fits."""
    state = os.statvfs(folder)
    free, needed = state.f_bavail * state.f_frsize, max(min_free_gib * GIB, 1.1 * checkpoint_bytes(folder))
    if free >= needed:
        return []
    return [f"{folder} has {free / GIB:.2f} GiB free, a checkpoint needs {needed / GIB:.2f}"]


def _probe(rank: int, size: int, store: str, out: str, order: int, seconds: float) -> None:
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = (torch.randn(order, order, device=device, dtype=dtype) for _ in range(2))

    def rate(work, amount: float) -> float:
        """`amount` per second in the fastest of several calls of `work`."""
        best, end = float("inf"), time.monotonic() + seconds
        work()
        while True:
            start = time.perf_counter()
            work()
            if gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
            if time.monotonic() > end:
                return amount / best

    tflops = rate(lambda: torch.mm(a, b), 2 * order**3 / 1e12)
    dist.init_process_group("nccl" if gpu else "gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    flat = a.view(-1)
    gbps = []
    for _ in range(5):  # a fixed number, because all ranks must take part
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(flat)
        if gpu:
            torch.cuda.synchronize()
        gbps.append(flat.nbytes * 2 * (size - 1) / size / (time.perf_counter() - start) / 1e9)
    dist.destroy_process_group()
    Path(out, f"{rank}.json").write_text(json.dumps({"tflops": tflops, "allreduce_gbps": max(gbps)}))


def measure(processes: int, order: int, seconds: float, timeout_s: float) -> list[dict[str, float]]:
    """TFLOP/s and all-reduce GB/s (bus bandwidth) of each process. Raises RuntimeError if one fails or hangs."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as out:
        arguments = (processes, os.path.join(out, "store"), out, order, seconds)
        context = mp.start_processes(_probe, arguments, processes, join=False, start_method="spawn")
        deadline = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"matmul and all-reduce did not end within {timeout_s} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(processes)]


def speed_faults(speeds: list[dict[str, float]], min_tflops: float, min_gbps: float) -> list[str]:
    """Which GPUs, or the all-reduce, are below the thresholds."""
    faults = []
    for rank, speed in enumerate(speeds):
        if speed["tflops"] < min_tflops:
            faults.append(f"GPU {rank} multiplies at {speed['tflops']:.3g} TFLOP/s, below {min_tflops}")
    slowest = min((speed["allreduce_gbps"] for speed in speeds), default=min_gbps)
    if len(speeds) > 1 and slowest < min_gbps:
        faults.append(f"all-reduce in the node at {slowest:.3g} GB/s, below {min_gbps}")
    return faults


def parser(**options: Any) -> argparse.ArgumentParser:
    """Flags of this module; `options` are argparse's own."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
    )
    p.add_argument("folder", type=Path, help="the run folder")
    p.add_argument("--gpus", type=int, default=8, help="expected GPUs, or processes on a CPU")
    p.add_argument("--cpu", action="store_true", help="the node has no GPU")
    p.add_argument("--max-used-mib", type=float, default=2048, help="memory of a GPU that may already be in use")
    p.add_argument("--min-free-gib", type=float, default=1, help="disk space that must be free in the run folder")
    p.add_argument("--min-tflops", type=float, default=0, help="matmul of each GPU")
    p.add_argument("--min-allreduce-gbps", type=float, default=0, help="bus bandwidth within the node, GB/s")
    p.add_argument("--seconds", type=float, default=2, help="how long to multiply")
    p.add_argument("--order", type=int, help="of the matrices; default 8192 on a GPU, 512 on a CPU")
    p.add_argument("--timeout", type=float, default=180, help="seconds for matmul and all-reduce together")
    return p


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    node = exit_record.host()
    gpus = [] if args.cpu else nvidia_smi()
    faults = ([] if args.cpu else gpu_faults(gpus, args.gpus, args.max_used_mib)) + disk_faults(
        args.folder, args.min_free_gib
    )
    speeds: list[dict[str, float]] = []
    if not faults:
        try:
            speeds = measure(args.gpus, args.order or (512 if args.cpu else 8192), args.seconds, args.timeout)
            faults = speed_faults(speeds, args.min_tflops, args.min_allreduce_gbps)
        except Exception as error:
            faults = [f"matmul and all-reduce failed: {str(error).strip().splitlines()[-1]}"]
    report = {"node": node, "machine": socket.gethostname(), "faults": faults, "gpus": gpus, "speeds": speeds}
    folder = args.folder / "preflight" / run_folder.attempt()
    write_json(folder / f"{node}.json", report)
    print(f"{node}: {'; '.join(faults) if faults else 'fit'} {speeds}")
    if faults:
        (folder / f"{node}.bad").write_text(node + "\n")
    return UNFIT if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
