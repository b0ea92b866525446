"""Measure launch configurations of the retention kernels and pin the best: writes ops/gated_retention/tuning.json.

    python benchmarks/tune_retention.py --dry-run     # one Hopper GPU, about three minutes; prints, writes nothing

Each candidate runs in a process of its own, because a miscompiled one can take its process down (with one stage, heads
of 256 met an illegal access on an H100 with Triton 3.6). It must agree with torch in float32 before it is timed.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from yoco_megatron.ops.gated_retention import log_decay_from_logits, tuning
from yoco_megatron.ops.gated_retention import triton as op
from yoco_megatron.ops.gated_retention.torch import chunkwise

SHAPES = {"128": (8, 4096, 24, 128), "256": (8, 4096, 12, 256)}  # B, T, H, D
COLUMNS_WARPS_STAGES = {
    "128": [(64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 8, 2), (128, 8, 3)],
    "256": [(32, 4, 2), (32, 4, 3), (64, 8, 2)],
}
BF16_TOLERANCE = 1e-2  # against torch in float32; a wrong kernel is off by far more


def runs(kernel: str, B: int, T: int, H: int, D: int):
    """(function that launches `kernel`, what it writes)."""
    q, k, v, do = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    g = log_decay_from_logits(torch.randn(B, T, H, device="cuda"))
    launch = op.plan(q, v, None, None, 1)
    sums, out = op.decay_sums(g, None, launch), torch.empty_like(v)

    def forward():
        return op.run_forward(q, k, v, sums, None, None, launch, out=out, need_final=False, need_anchors=True)

    if kernel == "forward":
        return forward, [out], (q, k, v, g, do)
    _, entering, anchors = forward()
    dq, dk, dv, dg = (torch.empty_like(x) for x in (q, k, v, g))

    def backward():
        op.run_backward(
            q, k, v, do, sums, None, entering, anchors, None, None, g, launch,
            dq=dq, dk=dk, dv=dv, dgate=dg, need_dstart=False,
        )  # fmt: skip

    return backward, [dq, dk, dv], (q, k, v, g, do)


def reference(kernel: str, q, k, v, g, do) -> list[torch.Tensor]:
    """The results for the first sample, by torch in float32."""
    leaves = [x[:1].float().requires_grad_() for x in (q, k, v, g)]
    o, _ = chunkwise(*leaves)
    if kernel == "forward":
        return [o.detach()]
    o.backward(do[:1].float())
    return [x.grad for x in leaves[:3]]


def measure(kernel: str, width: str, config: tuning.Config) -> float:
    """Milliseconds of one candidate, after checking it; raises AssertionError where it is wrong."""
    tuning._table()[kernel][width] = config
    run, written, inputs = runs(kernel, *SHAPES[width])
    run()
    for got, want in zip(written, reference(kernel, *inputs), strict=True):
        error = ((got[:1].float() - want).norm() / want.norm()).item()
        assert error < BF16_TOLERANCE, f"relative error {error:.1e}"
    return triton.testing.do_bench_cudagraph(run, rep=100, return_mode="median")


def in_a_process(kernel: str, width: str, candidate: tuple[int, int, int]) -> str:
    """`measure` in a fresh process: its milliseconds, or the last line of its error."""
    command = [sys.executable, __file__, "--measure", kernel, width, *map(str, candidate)]
    run = subprocess.run(command, capture_output=True, text=True)
    lines = (run.stdout if run.returncode == 0 else run.stderr).strip().splitlines()
    return lines[-1] if lines else f"ended by signal {-run.returncode} without a word"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print, do not write the table")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kernel, width, *numbers = options.measure
        print(measure(kernel, width, tuning.Config(*map(int, numbers))))
        return
    if not torch.cuda.is_available():
        raise SystemExit("tune_retention.py times kernels: it needs a GPU, and torch finds none")
    cases = [(k, w, c) for k in ("forward", "backward") for w in SHAPES for c in COLUMNS_WARPS_STAGES[w]]
    print("compiling", len(cases), "candidates ...", flush=True)
    with ThreadPoolExecutor(max_workers=4) as pool:  # compiles land in Triton's cache; these times do not count
        list(pool.map(lambda case: in_a_process(*case), cases))
    table = json.loads(tuning.TABLE.read_text())
    for kernel, width in dict.fromkeys(case[:2] for case in cases):
        times = {}
        for candidate in COLUMNS_WARPS_STAGES[width]:
            answer = in_a_process(kernel, width, candidate)
            print(
                f"{kernel:<9} D={width} columns {candidate[0]:<4} warps {candidate[1]} stages {candidate[2]}: {answer}"
            )
            try:
                times[candidate] = float(answer)
            except ValueError:
                continue  # it failed, as printed
        if not times:
            raise SystemExit(f"no candidate for {kernel} D={width} works here, see above; the table stays as it is")
        columns, warps, stages = min(times, key=times.get)
        table[kernel][width] = {"columns": columns, "num_warps": warps, "stages": stages}
    if not options.dry_run:
        rows = (
            f'  "{kernel}": {{\n'
            + ",\n".join(f'    "{shape}": {json.dumps(entry)}' for shape, entry in entries.items())
            + "\n  }"
            for kernel, entries in table.items()
        )
        tuning.TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        print("wrote", tuning.TABLE)


if __name__ == "__main__":
    main()
