"""Context parallelism: YOCO over two GPUs against one, and against Megatron's GPT with Transformer Engine's.

    python benchmarks/context_parallel.py --lengths 32768 65536              # two GPUs
    python benchmarks/context_parallel.py --lengths 131072 --longest

Every case is one run of pretrain_yoco.py on the same data, batch and flags: 3B shape with fewer layers, a small
vocabulary so that the head does not decide, full recompute, distributed optimizer overlapped with the layers
(configs/recipe/scaling.yaml). The one-GPU case uses one of the two. GPT has Transformer Engine's ring (p2p) and
all-gather. Two cases recompute less than everything, where memory is left: MLP and norms, not attention.

Prints tokens/s/GPU, the efficiency against one GPU with both steps, the gigabytes that a rank receives a step by the
formulas of docs/context_parallel.md, the peak memory that torch allocated, and the last loss; records each comparison
as soon as both its cases have run. A case that fails, for want of memory or of Transformer Engine, is a line that says
so. `--longest` doubles the length until ours no longer fits.
"""

import argparse
from pathlib import Path
from typing import Any

from received import received_gigabytes
from record import record
from runs import ROOT, Run, device_name, train

# What the model file of each self-decoder ends with.
SELF_DECODERS = {"gated_retention": "", "sliding_window": "_swa", "mamba2": "_mamba2", "gated_delta_net": "_delta"}
ALONE, OURS = "YOCO, one GPU", "YOCO"
TE_RING = "GPT, Transformer Engine p2p"
TE_GATHER = "GPT, Transformer Engine all_gather"
OURS_SELECTIVE, TE_SELECTIVE = "YOCO, selective recompute", "GPT, Transformer Engine p2p, selective recompute"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules mlp layernorm"
# name -> (is it ours, GPUs, flags)
CASES = {
    ALONE: (True, 1, FULL),
    OURS: (True, 2, f"--context-parallel-size 2 {FULL}"),
    OURS_SELECTIVE: (True, 2, f"--context-parallel-size 2 {SELECTIVE}"),
    TE_RING: (False, 2, f"--context-parallel-size 2 --cp-comm-type p2p {FULL}"),
    TE_GATHER: (False, 2, f"--context-parallel-size 2 --cp-comm-type all_gather {FULL}"),
    TE_SELECTIVE: (False, 2, f"--context-parallel-size 2 --cp-comm-type p2p {SELECTIVE}"),
}


def flags_of(name: str, length: int, options: argparse.Namespace) -> str:
    ours, _, flags = CASES[name]
    if ours and options.keep_cross_attention and name != OURS_SELECTIVE:
        flags += " --keep-cross-attention"
    ending = SELF_DECODERS[options.self_decoder] if ours else ""
    model = f"configs/model/{'yoco' if ours else 'transformer'}_{options.model}{ending}.yaml"
    return (
        f"--config {model} configs/recipe/scaling.yaml --num-layers {options.layers} --seq-length {length} "
        f"--max-position-embeddings {length} --rotary-base 1000000 --vocab-size 8000 --micro-batch-size 1 "
        f"--global-batch-size {micro_batches(length, options)} --exit-interval {options.steps} {flags}"
    )


def gigabytes(name: str, length: int, options: argparse.Namespace) -> float:
    """That a rank receives in a step, by the formulas."""
    _, gpus, _ = CASES[name]
    alone = flags_of(name, length, options).replace(f"--context-parallel-size {gpus}", "")
    return received_gigabytes(alone, gpus, micro_batches(length, options))


def micro_batches(length: int, options: argparse.Namespace) -> int:
    """Sequences a step: enough that the optimizer's part does not decide, few where a sequence takes seconds."""
    return options.micro_batches or (4 if length <= 65536 else 2)


def compare(length: int, options: argparse.Namespace, device: str) -> bool:
    """All cases at one length, each printed and recorded as soon as it has run; whether ours ran on two GPUs."""
    runs: dict[str, Run] = {}
    for name in CASES:  # ours before its peers
        if name not in options.cases:
            continue
        flags = flags_of(name, length, options)
        run = train(f"{name}, {length} tokens", flags, CASES[name][1], options.timeout, options.verbose)
        if run is None:
            print(f"{name:<48} does not run", flush=True)
            if name == OURS:  # nothing is left to compare
                return False
            continue
        runs[name] = run
        show(name, run, runs.get(ALONE), length, options)
        if name == OURS and ALONE in runs:
            record_efficiency(run, runs[ALONE], length, options, device)
        for ours in (OURS, OURS_SELECTIVE):
            if ours in runs and not CASES[name][0]:
                record_against(name, run, ours, runs[ours], length, options, device)
    for ours in (OURS, OURS_SELECTIVE):
        if ours in runs and all(CASES[name][0] for name in runs):  # no GPT to compare with
            value = rate(runs[ours], length, options)
            keep(ours, options, device, length, metric="throughput", unit="tokens/s/GPU", value=value)
    return OURS in runs


def rate(run: Run, length: int, options: argparse.Namespace, gpus: int = 2) -> int:
    """Tokens a second and GPU."""
    return round(length * micro_batches(length, options) / run.seconds / gpus)


def show(name: str, run: Run, alone: Run | None, length: int, options: argparse.Namespace) -> None:
    """One line: what a run did."""
    ours, gpus, _ = CASES[name]
    efficiency = ""
    if alone and ours and gpus > 1:
        one, both = alone.seconds * 1e3, run.seconds * 1e3
        efficiency = f", efficiency {one / both / gpus:.1%} ({one:,.0f} ms a step on one, {both:,.0f} on {gpus})"
    peak = "" if run.peak_gib is None else f", peak {run.peak_gib:.1f} GiB"
    print(
        f"{name:<48} {rate(run, length, options, gpus):,} tokens/s/GPU{efficiency}, "
        f"{gigabytes(name, length, options):.2f} GB received a step{peak}, last loss {run.losses[-1]:.4f}",
        flush=True,
    )


def record_efficiency(ours: Run, alone: Run, length: int, options: argparse.Namespace, device: str) -> None:
    """Our step beside the ideal one; their ratio is the efficiency."""
    values = dict(value=round(ours.seconds * 1e3, 1), peer_value=round(alone.seconds * 1e3 / 2, 1))
    values |= dict(peer="half a step on one GPU", higher_is_better=False)
    keep(OURS, options, device, length, metric="step", unit="ms", **values)


def record_against(
    name: str, peer: Run, case: str, ours: Run, length: int, options: argparse.Namespace, device: str
) -> None:
    """Throughput and memory of one of our cases beside those of a GPT."""
    values = dict(value=rate(ours, length, options), peer=name, peer_value=rate(peer, length, options))
    keep(case, options, device, length, metric="throughput", unit="tokens/s/GPU", **values)
    if ours.peak_gib and peer.peak_gib:
        values = dict(value=round(ours.peak_gib, 2), peer=name, peer_value=round(peer.peak_gib, 2))
        keep(case, options, device, length, metric="peak memory", unit="GiB", higher_is_better=False, **values)


def keep(case: str, options: argparse.Namespace, device: str, length: int, **row: Any) -> None:
    """One row of this benchmark."""
    title = f"{options.model} {options.layers} layers {options.self_decoder} {length} bf16 CP2"
    if case == OURS_SELECTIVE:
        title += " selective recompute"
    elif options.keep_cross_attention:
        title += " kept attention"
    record(options.output, benchmark="context_parallel", case=title, device=device, **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--self-decoder", choices=list(SELF_DECODERS), default="gated_retention")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--longest", action="store_true", help="go on with twice the length until ours fails")
    parser.add_argument("--keep-cross-attention", action="store_true", help="ours computes cross attention once")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--micro-batches", type=int, help="sequences a step; default: 4, above 65536 tokens 2")
    parser.add_argument("--steps", type=int, default=5, help="the median of the last half counts")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one run")
    parser.add_argument("--verbose", action="store_true", help="print the end of a failed run's log")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    device = device_name(2)
    fits = False
    for length in options.lengths:
        fits = compare(length, options, device)
    while options.longest and fits:
        length *= 2
        fits = compare(length, options, device)


if __name__ == "__main__":
    main()
