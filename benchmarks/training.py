"""Training speed of YOCO beside Megatron's GPT of the same hidden size, layers, heads, FFN, vocabulary, flags and data.

    python benchmarks/training.py --lengths 4096 --micro-batches 2                      # one GPU, about three minutes
    python benchmarks/training.py --lengths 4096 --micro-batches 4 GPT=1 --precisions bf16 delayed
    python benchmarks/training.py --lengths 32768 --chunk-gpt-loss --micro-batches 1
    python benchmarks/training.py --model 160m --lengths 1024 --batch-tokens 8192 --cuda-graph   # and without it
    python benchmarks/training.py --meshes 1 DP8 TP2xDP4 PP2xTP2xDP2 "PP2xTP2xDP2 VP2" --models GPT gated_retention
    python benchmarks/training.py --meshes CP8 --lengths 131072 --micro-batches 1

A mesh is named by its sizes, in any order: DP and TP (with sequence parallelism), PP (VP2: interleaved, two chunks a
rank), CP. Its GPUs are the product. The distributed optimizer is in the recipe.

For each length, precision and mesh the models take turns, GPT first, --rounds times; each at its own micro-batches,
where one that does not fit is halved. The best micro-batch counts. A row is printed and recorded as soon as it is
known: tokens/s/GPU, TFLOP/s by the model's own causal FLOPs (no recompute, no masked half), MFU against the vendor's
peak and against a measured matrix product, peak memory, the ratio to GPT on the same mesh, the fraction of the speed
on one GPU where the call has that, too, and with context parallelism what a rank receives a step, by formula.
Two of these may run on one host at once, each with its own CUDA_VISIBLE_DEVICES.
"""

import argparse
import re

from cases import (
    MODELS,
    PRECISIONS,
    add_arguments,
    flags_of,
    largest_that_fits,
    measure_device,
    sequences,
    title,
)
from mesh import Mesh
from record import record
from runs import Run

ONE_GPU, ALONE = Mesh.of("1"), "one GPU"
HEAD = (
    f"{'model':<44} {'micro':>5} {'tokens/s':>9} {'TFLOP/s':>7} {'MFU':>6} {'of measured':>11} {'GiB':>6} {'ratio':>6} "
    f"{'of one GPU':>10}"
)


def micro_batches(items: list[str]) -> dict[str, list[int]]:
    """`2`, `4` or `GPT=1,2` to {model: micro-batches, largest first}; a model's own items replace those of all."""
    own: dict[str, list[int]] = {}
    for item in items:
        model, _, sizes = item.rpartition("=")
        if (model and model not in MODELS) or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", sizes):
            raise ValueError(f"--micro-batches {item}: expected N or MODEL=N,N with a model of {', '.join(MODELS)}")
        own.setdefault(model, []).extend(int(size) for size in sizes.split(","))
    return {model: sorted(own.get(model, own.get("", [1])), reverse=True) for model in MODELS}


def gflop_per_token(run: Run) -> float:
    """Of a training step, as the mathematics needs them; the run's log says it (yoco_megatron/costs/flops.py)."""
    return float(re.search(r"([0-9.]+) GFLOP a token to train", run.log).group(1))


def best_run(
    model: str, length: int, precision: str, mesh: Mesh, options: argparse.Namespace
) -> tuple[int, Run] | None:
    """The fastest of the model's micro-batches, none twice."""
    best, tried = None, set()
    most = sequences(length, mesh, options) // mesh.dp
    for size in micro_batches(options.micro_batches)[model]:
        if size > most or size in tried:
            continue
        fitted, run = largest_that_fits(model, length, precision, size, mesh, options)
        tried |= {size, fitted}
        if isinstance(run, Run) and (best is None or run.seconds < best[1].seconds):
            best = fitted, run
    return best


def received(model: str, length: int, precision: str, mesh: Mesh, options: argparse.Namespace) -> float | None:
    """GB a rank and step, from the others of its context; None without, or where a pipeline spreads the layers."""
    if mesh.cp == 1 or mesh.pp > 1:
        return None
    from received import received_gigabytes  # imports Megatron, which nothing else here needs

    alone = flags_of(model, length, precision, 1, ONE_GPU, options)
    return received_gigabytes(alone, mesh.cp, sequences(length, mesh, options) // mesh.dp, mesh.tp)


def report(
    case: str, size: int, run: Run, tokens: int, device: tuple[str, float, float], peers: dict[str, float],
    options: argparse.Namespace, received_gb: float | None = None,
) -> float:  # fmt: skip
    """Print and record one model's result; the tokens/s/GPU. `peers`: {name: tokens/s/GPU}."""
    name, stated, measured = device
    rate = tokens / run.seconds
    speed = rate * gflop_per_token(run) * 1e9
    shares = [f"{speed / peak:.1%}" if peak else "" for peak in (stated, measured)]
    ratio = next((f"{rate / value:.3f}" for peer, value in peers.items() if peer != ALONE), "")
    efficiency = f"{rate / peers[ALONE]:.1%}" if ALONE in peers else ""
    print(
        f"{HEAD}\n{case:<44} {size:>5} {rate:>9,.0f} {speed / 1e12:>7.1f} {shares[0]:>6} {shares[1]:>11} "
        f"{run.peak_gib or 0:>6.1f} {ratio:>6} {efficiency:>10}"
        + (f"\n{received_gb:.2f} GB received a step" if received_gb else ""),
        flush=True,
    )
    common = dict(benchmark="training", case=f"{case}, micro-batch {size}", device=name)
    throughput = dict(metric="throughput", unit="tokens/s/GPU", value=round(rate)) | common
    for peer, value in peers.items():
        record(options.output, **throughput, peer=peer, peer_value=round(value))
    if not peers:
        record(options.output, **throughput)
    if stated:
        record(options.output, metric="MFU", unit="", value=round(speed / stated, 4), **common)
    if run.peak_gib:
        record(options.output, metric="peak memory", unit="GiB", value=round(run.peak_gib, 2), **common)
    if received_gb:
        record(options.output, metric="received a step", unit="GB", value=round(received_gb, 2), **common)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bf16"])
    parser.add_argument(
        "--meshes", nargs="+", type=Mesh.of, default=[ONE_GPU], help="1, DP8, TP2xPP4, 'PP2xTP2xDP2 VP2', CP4, ..."
    )
    parser.add_argument(
        "--micro-batches", nargs="+", default=["1"], metavar="[MODEL=]N[,N]", help="to try, of all models or of one"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="turns of each model, for what else goes on in the machine"
    )
    options = parser.parse_args()
    try:
        micro_batches(options.micro_batches)
    except ValueError as error:
        parser.error(str(error))
    device = measure_device()
    failed = []
    for length in options.lengths:
        for precision in options.precisions:
            alone: dict[str, float] = {}
            for mesh in sorted(options.meshes, key=lambda mesh: mesh.gpus):  # one GPU first, others compare with it
                gpt: tuple[str, float] | None = None
                for _ in range(options.rounds):
                    for model in sorted(options.models, key=list(MODELS).index):
                        case = title(model, length, precision, mesh, options)
                        best = best_run(model, length, precision, mesh, options)
                        if best is None:
                            failed.append(case)
                            continue
                        peers = dict([gpt]) if gpt and model != "GPT" else {}
                        if model in alone and mesh != ONE_GPU:
                            peers[ALONE] = alone[model]
                        tokens = sequences(length, mesh, options) * length / mesh.gpus
                        moved = received(model, length, precision, mesh, options)
                        rate = report(case, *best, tokens, device, peers, options, moved)
                        if model == "GPT":
                            gpt = f"Megatron {case.split(' ', 1)[1]}, micro-batch {best[0]}", rate
                        if mesh == ONE_GPU:
                            alone[model] = rate
    if failed:
        raise SystemExit(f"no result for {', '.join(failed)}")


if __name__ == "__main__":
    main()
