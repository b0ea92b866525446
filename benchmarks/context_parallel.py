"""Context parallelism: YOCO over two GPUs against one, and against Megatron's GPT with Transformer Engine's.

    python benchmarks/context_parallel.py --lengths 32768 65536              # two GPUs, about eight minutes
    python benchmarks/context_parallel.py --lengths 131072 --longest

Every case is one run of pretrain_yoco.py on the same data, batch and flags: 3B shape with fewer layers, a small
vocabulary so that the head does not decide, full recompute. GPT has Transformer Engine's ring (p2p) and all-gather.
Prints tokens/s/GPU, the efficiency against one GPU, the gigabytes that a rank receives a step by the formulas of
docs/context_parallel.md, the peak memory that torch allocated, and the last loss. A case that fails, for want of memory
or of Transformer Engine, is a line that says so. `--longest` doubles the length until ours no longer fits.
"""

import argparse
from pathlib import Path

from record import record
from runs import MOCK, ROOT, device_name, train

from yoco_megatron import runtime

runtime.prepare()

from yoco_megatron.config import arguments
from yoco_megatron.config.shape import ModelShape
from yoco_megatron.parallel.traffic import received_bytes

TE_RING = "GPT, Transformer Engine p2p"
TE_GATHER = "GPT, Transformer Engine all_gather"
# name -> (is it ours, GPUs, flags)
CASES = {
    "YOCO, one GPU": (True, 1, ""),
    "YOCO": (True, 2, "--context-parallel-size 2"),
    TE_RING: (False, 2, "--context-parallel-size 2 --cp-comm-type p2p"),
    TE_GATHER: (False, 2, "--context-parallel-size 2 --cp-comm-type all_gather"),
}


def flags_of(name: str, length: int, options: argparse.Namespace) -> str:
    ours, _, flags = CASES[name]
    suffix = "_swa" if ours and options.self_decoder == "sliding_window" else ""
    model = f"configs/model/{'yoco' if ours else 'transformer'}_{options.model}{suffix}.yaml"
    return (
        f"--config {model} configs/recipe/scaling.yaml --num-layers {options.layers} --seq-length {length} "
        f"--max-position-embeddings {length} --rotary-base 1000000 --micro-batch-size 1 "
        f"--global-batch-size {options.micro_batches} --vocab-size 8000 --exit-interval {options.steps} "
        f"--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 {flags}"
    )


def gigabytes(name: str, length: int, options: argparse.Namespace) -> float:
    """That a rank receives in a step, by the formulas."""
    _, gpus, flags = CASES[name]
    alone = flags_of(name, length, options).removesuffix(flags)  # nothing is started here
    parsed = arguments.parse([*MOCK.split(), *alone.split()])
    per_micro_batch = sum(received_bytes(ModelShape.from_args(parsed), gpus, recompute=True).values())
    return per_micro_batch * options.micro_batches / 1e9


def compare(length: int, options: argparse.Namespace, device: str) -> bool:
    """All cases at one length; whether ours ran on two GPUs."""
    runs = {
        name: train(
            f"{name}, {length} tokens",
            flags_of(name, length, options),
            CASES[name][1],
            options.timeout,
            options.verbose,
        )
        for name in options.cases
    }
    print(f"\n{'run':<36} {'tokens/s/GPU':>12} {'efficiency':>10} {'GB/step':>8} {'peak GiB':>8} {'last loss':>10}")
    single = runs.get("YOCO, one GPU")
    for name, run in runs.items():
        ours, gpus, _ = CASES[name]
        if run is None:
            print(f"{name:<36} {'does not run':>12}")
            continue
        rate = length * options.micro_batches / run.seconds / gpus
        efficiency = f"{single.seconds / run.seconds / gpus:.1%}" if single and ours and gpus > 1 else ""
        peak = "" if run.peak_gib is None else f"{run.peak_gib:.1f}"
        print(
            f"{name:<36} {rate:>12,.0f} {efficiency:>10} {gigabytes(name, length, options):>8.2f} {peak:>8} "
            f"{run.losses[-1]:>10.4f}"
        )
    mine = runs.get("YOCO")
    if mine is None:
        return False
    case = f"{options.model} {options.layers} layers {options.self_decoder} {length} bf16 CP2"
    per_gpu = round(length * options.micro_batches / mine.seconds / 2)
    common = dict(benchmark="context_parallel", case=case, device=device)
    if single:
        value = round(single.seconds / mine.seconds / 2, 4)
        record(
            options.output, metric="efficiency", unit="", value=value, peer="one GPU, ideal", peer_value=1.0, **common
        )
    for name in (TE_RING, TE_GATHER):
        if run := runs.get(name):
            value = round(length * options.micro_batches / run.seconds / 2)
            record(
                options.output,
                metric="throughput",
                unit="tokens/s/GPU",
                value=per_gpu,
                peer=name,
                peer_value=value,
                **common,
            )
            if mine.peak_gib and run.peak_gib:
                record(
                    options.output,
                    metric="peak memory",
                    unit="GiB",
                    value=round(mine.peak_gib, 2),
                    peer=name,
                    peer_value=round(run.peak_gib, 2),
                    higher_is_better=False,
                    **common,
                )
    if not any(runs.get(name) for name in (TE_RING, TE_GATHER)):
        record(options.output, metric="throughput", unit="tokens/s/GPU", value=per_gpu, **common)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--self-decoder", choices=["gated_retention", "sliding_window"], default="gated_retention")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--longest", action="store_true", help="go on with twice the length until ours fails")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--micro-batches", type=int, default=4, help="sequences a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--timeout", type=int, default=240, help="seconds for one run")
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
