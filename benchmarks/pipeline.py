"""Pipeline parallelism: YOCO over two stages against one GPU, and against Megatron's GPT of the same size and mesh.

    python benchmarks/pipeline.py --model 1.4b --self-decoder swa --steps 8      # two GPUs, about five minutes

Every case is one run of pretrain_yoco.py: same data, batch and flags. Prints tokens/s, the bubble (one minus the
speed-up over one GPU divided by the number of GPUs), the megabytes that cross each boundary a micro-batch, and the last
loss.
"""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from record import record

from yoco_megatron.config.files import load_config_files

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """What a training log says."""

    tokens_per_second: float
    losses: list[float]
    megabytes: list[float]


def train(name: str, model: str, gpus: int, flags: str, options: argparse.Namespace) -> Run:
    """One run; tokens/s from the median step after the first two."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    command += ["pretrain_yoco.py", "--config", f"configs/model/{model}.yaml", "configs/recipe/scaling.yaml"]
    command += f"--mock-data --tokenizer-type NullTokenizer --vocab-size 100000 --lr 3e-4 --lr-warmup-iters 2 \
        --log-interval 1 \
        --micro-batch-size {options.micro_batch_size} --global-batch-size {options.global_batch_size} \
        --seq-length {options.seq_length} --max-position-embeddings {options.seq_length} \
        --exit-interval {options.steps} --eval-iters 0 {flags}".split()
    print(f"== {name}", flush=True)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if run.returncode:
        sys.exit(f"{name} failed:\n{run.stderr[-4000:]}")
    times = [float(value) for value in re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", run.stdout)]
    tokens = options.global_batch_size * options.seq_length
    stages = re.findall(r"^ +\d+ +\d+ +\d+ +\d+ .*?% +([0-9.]+) +[0-9.]+ +[0-9.]+%$", run.stdout, re.MULTILINE)
    result = Run(
        tokens / (median(times[2:]) / 1e3),
        [float(value) for value in re.findall(r"lm loss: ([0-9.E+-]+) \|", run.stdout)],
        [float(value) for value in stages],
    )
    print(f"   {result.tokens_per_second:,.0f} tokens/s, losses {result.losses}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.4b")
    parser.add_argument("--self-decoder", choices=["swa", "gated_retention"], default="swa")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=64)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    import torch

    device = f"2x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "2 CPU processes"
    yoco = f"yoco_{options.model}" + ("_swa" if options.self_decoder == "swa" else "")
    gpt = f"transformer_{options.model}"
    pp2 = "--pipeline-model-parallel-size 2"
    vp2 = f"{pp2} --num-virtual-stages-per-pipeline-rank 2"
    runs = {
        "YOCO one GPU": train("YOCO one GPU", yoco, 1, "", options),
        "YOCO PP2": train("YOCO PP2", yoco, 2, pp2, options),
        "YOCO PP2 VP2": train("YOCO PP2 VP2", yoco, 2, vp2, options),
        "GPT one GPU": train("GPT one GPU", gpt, 1, "", options),
        "GPT PP2": train("GPT PP2", gpt, 2, pp2, options),
        "GPT PP2 VP2": train("GPT PP2 VP2", gpt, 2, vp2, options),
    }
    hidden_size = load_config_files([str(ROOT / f"configs/model/{gpt}.yaml")])["hidden-size"]
    hidden_megabytes = options.micro_batch_size * options.seq_length * hidden_size * 2 / 1e6
    print(f"\n{'run':<14} {'tokens/s':>10} {'bubble':>7} {'MB/boundary':>24} {'last loss':>10}")
    for name, run in runs.items():
        single = runs.get(f"{name.split()[0]} one GPU")
        bubble = f"{1 - run.tokens_per_second / single.tokens_per_second / 2:.1%}" if single and "PP2" in name else ""
        # GPT's boundaries all carry hidden states alone, as the first one of an interleaved YOCO does.
        megabytes = run.megabytes[1:] or [hidden_megabytes] * ("PP2" in name) * (3 if "VP2" in name else 1)
        boundaries = " ".join(f"{value:.1f}" for value in megabytes)
        print(f"{name:<14} {run.tokens_per_second:>10,.0f} {bubble:>7} {boundaries:>24} {run.losses[-1]:>10.4f}")
    for mesh in ("PP2", "PP2 VP2"):
        ours, peer = runs[f"YOCO {mesh}"], runs[f"GPT {mesh}"]
        record(
            options.output,
            benchmark="pipeline",
            case=f"{options.model} {options.self_decoder} {options.seq_length} bf16 {mesh}",
            metric="throughput",
            unit="tokens/s",
            value=round(ours.tokens_per_second),
            peer="Megatron GPT, same mesh",
            peer_value=round(peer.tokens_per_second),
            device=device,
        )
        record(
            options.output,
            benchmark="pipeline",
            case=f"{options.model} {options.self_decoder} {options.seq_length} bf16 {mesh}",
            metric="speed-up over one GPU",
            unit="x",
            value=round(ours.tokens_per_second / runs["YOCO one GPU"].tokens_per_second, 3),
            peer="ideal",
            peer_value=2.0,
            device=device,
        )
    worst = max(
        abs(a - b) / b
        for mesh in ("PP2", "PP2 VP2")
        for a, b in zip(runs[f"YOCO {mesh}"].losses, runs["YOCO one GPU"].losses)
    )
    print(f"largest relative difference of a loss from the one-GPU run: {worst:.1e}")
    if os.environ.get("YOCO_MAX_LOSS_DIFFERENCE"):
        sys.exit(worst > float(os.environ["YOCO_MAX_LOSS_DIFFERENCE"]))


if __name__ == "__main__":
    main()
