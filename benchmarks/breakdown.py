"""Where the time of a training step goes: its GPU kernels in groups, and the time when none ran.

    python benchmarks/breakdown.py --models gated_retention GPT --micro-batch 2          # one GPU, about two minutes

One step is recorded by torch's profiler after those that warm up (Megatron's --profile --use-pytorch-profiler). Each
moment of it belongs to one kernel, that of computation where communication runs beside it, or to none (idle), so the
parts sum to the step. Kernels of the output layer and the loss are told by the operator that launched them, all others
by their names. Recording slows the processor, so small models look more idle than they are: the table names the step
time without it, too.
"""

import argparse
import bisect
import gzip
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

from cases import PRECISIONS, add_arguments, largest_that_fits, measure_device, title
from mesh import Mesh
from record import record
from runs import Run

# The first match counts; names are those of cuBLAS, cuDNN, Transformer Engine, torch, inductor and our Triton kernels.
GROUPS = {
    "communication": r"nccl",
    "attention": r"sdpa|flash|fmha|attention|attn|dot_do_o|convert_dq",
    "retention": r"^(forward|backward|decay_sums|segment_states|chain_segments|anchor_products|decay_gradient)$",
    "optimizer": r"multi_tensor|adam",
    "GEMM": r"gemm|nvjet|cutlass|cublas|xmma|splitk",
    "FP8 casts": r"fp8|float8|e4m3|e5m2|amax|quantize|block_scaled|cast_transpose|transpose_kernel",
    "elementwise and norms": r"",
}
HEAD_AND_LOSS = r"CrossEntropy|LinearWithGradAccumulation"  # forward, and inside autograd's backward
ORDER = ["GEMM", "attention", "retention", "elementwise and norms", "FP8 casts", "head and loss", "optimizer"]
ORDER += ["communication", "idle"]
FIRST_STEP = 6
Kernel = tuple[float, float, str, str]  # start and stop in microseconds, group, name


def group_of(kernel: str) -> str:
    """The group of a kernel by its name."""
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE))


class Spans:
    """Intervals of time, one list a thread; asks whether a moment lies in one of them."""

    def __init__(self) -> None:
        self._of: dict[int, list[tuple[float, float]]] = defaultdict(list)

    def add(self, thread: int, start: float, stop: float) -> None:
        self._of[thread].append((start, stop))

    def merge(self) -> None:
        """Sort, and join what overlaps; call it once before asking."""
        for thread, spans in self._of.items():
            joined: list[tuple[float, float]] = []
            for start, stop in sorted(spans):
                if joined and start <= joined[-1][1]:
                    joined[-1] = joined[-1][0], max(joined[-1][1], stop)
                else:
                    joined.append((start, stop))
            self._of[thread] = joined

    def __contains__(self, moment: tuple[int, float]) -> bool:
        thread, time = moment
        spans = self._of.get(thread, [])
        at = bisect.bisect_right(spans, (time, float("inf"))) - 1
        return at >= 0 and time <= spans[at][1]


def read_kernels(events: list[dict]) -> tuple[list[Kernel], float]:
    """Kernels of the recorded step as (start, stop, group, name), and its length, all in microseconds.

    Args:
        events: `traceEvents` of torch's profiler.
    Raises:
        ValueError: no step, or no kernel in it.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    steps = [
        event for event in whole if event["name"].startswith("ProfilerStep#") and event["cat"] == "user_annotation"
    ]
    head, launched = Spans(), {}
    for event in whole:
        if event.get("cat") == "cpu_op" and re.search(HEAD_AND_LOSS, event["name"]):
            head.add(event["tid"], event["ts"], event["ts"] + event["dur"])
        elif event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launched[event["args"].get("correlation")] = event["tid"], event["ts"]
    head.merge()
    kernels = []
    for event in whole:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        group = group_of(event["name"])
        launch = launched.get(event["args"].get("correlation"))
        if launch and launch in head and group != "communication":
            group = "head and loss"
        kernels.append((event["ts"], event["ts"] + event["dur"], group, event["name"]))
    if not kernels or not steps:
        raise ValueError("the profile holds no step with GPU kernels: is there a GPU, and may this user profile it?")
    return sorted(kernels), sum(step["dur"] for step in steps) / len(steps)


def divide(kernels: list[Kernel], step: float) -> dict[str, float]:
    """Microseconds of each group: every moment counts once, for communication only where nothing else runs.

    `step` is the step's length: what no kernel covers of it is "idle".
    """
    times: dict[str, float] = defaultdict(float)
    sends = [kernel for kernel in kernels if kernel[2] == "communication"]
    computes = [kernel for kernel in kernels if kernel[2] != "communication"]
    for alike in (computes, sends):
        covered = -float("inf")
        for start, stop, group, _ in alike:
            times[group] += max(0.0, stop - max(start, covered))
            covered = max(covered, stop)
    if sends:
        times["communication"] -= covered_by(sends, computes)
    times["idle"] = max(0.0, step - sum(times.values()))
    return dict(times)


def gaps(kernels: list[Kernel]) -> list[tuple[float, str, str]]:
    """(microseconds, kernel before, kernel after) of each moment between kernels in which none ran, longest first."""
    found, covered, before = [], kernels[0][0], ""
    for start, stop, _, name in kernels:
        if start > covered:
            found.append((start - covered, before, name))
        if stop > covered:
            covered, before = stop, name
    return sorted(found, reverse=True)


def covered_by(inner: list[Kernel], outer: list[Kernel]) -> float:
    """How long a kernel of each list runs at once."""
    edges = [(moment, which, change) for which, kernels in enumerate((inner, outer)) for start, stop, *_ in kernels
             for moment, change in ((start, 1), (stop, -1))]  # fmt: skip
    running, last, total = [0, 0], 0.0, 0.0
    for moment, which, change in sorted(edges):
        total += (moment - last) * bool(running[0] and running[1])
        running[which] += change
        last = moment
    return total


def report(case: str, events: list[dict], run: Run, device: str, options: argparse.Namespace) -> None:
    """Print the table of one case, its longest kernels, and where none ran; record a row a group."""
    kernels, step = read_kernels(events)
    times = divide(kernels, step)
    alongside = sum(k[1] - k[0] for k in kernels if k[2] == "communication") - times.get("communication", 0.0)
    print(f"\n{case}: {step / 1e3:,.1f} ms recorded, {run.seconds * 1e3:,.1f} ms without recording")
    print(f"{'group':<24} {'ms':>9} {'share':>6} {'kernels':>8}")
    for group in ORDER:
        if not times.get(group):
            continue
        count = sum(kernel[2] == group for kernel in kernels)
        print(f"{group:<24} {times[group] / 1e3:>9.2f} {times[group] / step:>6.1%} {count:>8}")
        record(
            options.output, benchmark="breakdown", case=case, metric=group, unit="ms", device=device,
            value=round(times[group] / 1e3, 3), peer="the whole step", peer_value=round(step / 1e3, 3),
            higher_is_better=True,
        )  # fmt: skip
    if alongside > 0:
        print(f"{'communication alongside':<24} {alongside / 1e3:>9.2f}")
    longest: dict[tuple[str, str], list[float]] = defaultdict(list)
    for start, stop, group, name in kernels:
        longest[group, name].append(stop - start)
    print("\nlongest kernels (ms, count, group, name)")
    for (group, name), durations in sorted(longest.items(), key=lambda item: -sum(item[1]))[: options.kernels]:
        print(f"{sum(durations) / 1e3:>9.2f} {len(durations):>6}  {group:<22} {name[:110]}")
    waits = gaps(kernels)
    short = [wait for wait, *_ in waits if wait < 20]
    print(
        f"\nidle between kernels: {sum(short) / 1e3:.2f} ms in {len(short)} gaps below 20 us; the longest (ms, between)"
    )
    for wait, before, after in waits[: options.gaps]:
        print(f"{wait / 1e3:>9.2f}  {before[:60]}  and  {after[:60]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    parser.add_argument("--mesh", type=Mesh.of, default="1")
    parser.add_argument("--micro-batch", type=int, default=1, help="halved where it does not fit")
    parser.add_argument("--kernels", type=int, default=30, help="how many of the longest kernels to list")
    parser.add_argument("--gaps", type=int, default=15, help="how many of the longest waits between kernels to list")
    parser.add_argument("--keep", type=Path, help="folder for the recorded profiles (Perfetto reads them)")
    options = parser.parse_args()
    options.steps = FIRST_STEP + 1
    device, *_ = measure_device()
    failed = []
    for model in options.models:
        case = title(model, options.length, options.precision, options.mesh, options)
        folder = options.keep / model if options.keep else Path(tempfile.mkdtemp())
        profile = (
            f"--profile --use-pytorch-profiler --profile-step-start {FIRST_STEP} --profile-step-end {FIRST_STEP + 1} "
            f"--profile-ranks 0 --tensorboard-dir {folder.resolve()}/tensorboard"
        )
        size, run = largest_that_fits(
            model, options.length, options.precision, options.micro_batch, options.mesh, options, profile
        )
        if not isinstance(run, Run):
            failed.append(case)
            continue
        with gzip.open(folder / "torch_profile/rank-0.json.gz", "rt") as file:
            events = json.load(file)["traceEvents"]
        report(f"{case}, micro-batch {size}", events, run, device, options)
    if failed:
        raise SystemExit(f"no result for {', '.join(failed)}")


if __name__ == "__main__":
    main()
