"""Pipeline parallelism: YOCO over two stages against one GPU, and against Megatron's GPT of the same size and mesh.

    python benchmarks/pipeline.py --model 1.4b --self-decoder swa     # two GPUs, about five minutes

Every case is one run of pretrain_yoco.py: same data, batch and flags. Prints tokens/s, the bubble (one minus the
speed-up over one GPU divided by the number of GPUs), the megabytes that cross each boundary a micro-batch, and the last
loss.
"""

import argparse
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cases import PRECISIONS
from record import record
from runs import ROOT, Run, device_name, train

from yoco_megatron.config.yaml_files import load_config_files


def run(name: str, model: str, gpus: int, mesh: str, options: argparse.Namespace, **settings: str) -> Run:
    """One run, in an environment with `settings`; it must succeed."""
    flags = (
        f"--config configs/model/{model}.yaml configs/recipe/scaling.yaml --vocab-size 100000 "
        f"--micro-batch-size {options.micro_batch_size} --global-batch-size {options.global_batch_size} "
        f"--seq-length {options.seq_length} --max-position-embeddings {options.seq_length} "
        f"--exit-interval {options.steps} {mesh} {PRECISIONS[options.precision]}"
    )
    return train(name, flags, gpus, verbose=True, **settings) or sys.exit(f"{name} failed")


def megabytes_sent(run: Run) -> list[float]:
    """What each stage receives a micro-batch, from the stage table in the log."""
    stages = re.findall(r"^ +\d+ +\d+ +\d+ +\d+ .*?% +([0-9.]+) +[0-9.]+ +[0-9.]+%$", run.log, re.MULTILINE)
    return [float(value) for value in stages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.4b")
    parser.add_argument("--self-decoder", choices=["swa", "gated_retention"], default="swa")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    device = device_name(2)
    yoco = f"yoco_{options.model}" + ("_swa" if options.self_decoder == "swa" else "")
    gpt = f"transformer_{options.model}"
    pp2 = "--pipeline-model-parallel-size 2"
    vp2 = f"{pp2} --num-virtual-stages-per-pipeline-rank 2"
    with ThreadPoolExecutor() as side_by_side:
        ours = side_by_side.submit(run, "YOCO one GPU", yoco, 1, "", options)
        peer = side_by_side.submit(run, "GPT one GPU", gpt, 1, "", options, CUDA_VISIBLE_DEVICES="1")
    runs = {
        "YOCO one GPU": ours.result(),
        "YOCO PP2": run("YOCO PP2", yoco, 2, pp2, options),
        "YOCO PP2 VP2": run("YOCO PP2 VP2", yoco, 2, vp2, options),
        "GPT one GPU": peer.result(),
        "GPT PP2": run("GPT PP2", gpt, 2, pp2, options),
        "GPT PP2 VP2": run("GPT PP2 VP2", gpt, 2, vp2, options),
    }
    tokens = options.global_batch_size * options.seq_length
    hidden_size = load_config_files([str(ROOT / f"configs/model/{gpt}.yaml")])["hidden-size"]
    hidden_megabytes = options.micro_batch_size * options.seq_length * hidden_size * 2 / 1e6
    print(f"\n{'run':<14} {'tokens/s':>10} {'bubble':>7} {'MB/boundary':>24} {'last loss':>10}")
    for name, one in runs.items():
        single = runs.get(f"{name.split()[0]} one GPU")
        bubble = f"{1 - single.seconds / one.seconds / 2:.1%}" if single and "PP2" in name else ""
        # GPT's boundaries all carry hidden states alone, as the first one of an interleaved YOCO does.
        megabytes = megabytes_sent(one)[1:] or [hidden_megabytes] * ("PP2" in name) * (3 if "VP2" in name else 1)
        boundaries = " ".join(f"{value:.1f}" for value in megabytes)
        print(f"{name:<14} {tokens / one.seconds:>10,.0f} {bubble:>7} {boundaries:>24} {one.losses[-1]:>10.4f}")
    for mesh in ("PP2", "PP2 VP2"):
        ours, peer = runs[f"YOCO {mesh}"], runs[f"GPT {mesh}"]
        case = f"{options.model} {options.self_decoder} {options.seq_length} {options.precision} {mesh}"
        common = dict(benchmark="pipeline", case=case, device=device)
        record(
            options.output,
            metric="throughput",
            unit="tokens/s",
            value=round(tokens / ours.seconds),
            peer="Megatron GPT, same mesh",
            peer_value=round(tokens / peer.seconds),
            **common,
        )
        record(
            options.output,
            metric="speed-up over one GPU",
            unit="x",
            value=round(runs["YOCO one GPU"].seconds / ours.seconds, 3),
            peer="ideal",
            peer_value=2.0,
            **common,
        )
    worst = max(
        abs(a - b) / b
        for mesh in ("PP2", "PP2 VP2")
        for a, b in zip(runs[f"YOCO {mesh}"].losses, runs["YOCO one GPU"].losses)
    )
    print(f"largest relative difference of a loss from the one-GPU run: {worst:.1e}")


if __name__ == "__main__":
    main()
