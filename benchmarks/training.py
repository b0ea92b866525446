"""Training speed of YOCO beside Megatron's GPT of the same hidden size, layers, heads, FFN, vocabulary, flags and data.

    python benchmarks/training.py --lengths 4096 --micro-batches 2                      # one GPU, about three minutes
    python benchmarks/training.py --lengths 4096 --micro-batches 4 GPT=1 --precisions bf16 delayed
    python benchmarks/training.py --lengths 32768 --chunk-gpt-loss --micro-batches 1
    python benchmarks/training.py --model 160m --lengths 1024 --batch-tokens 8192 --cuda-graph   # and without it
    python benchmarks/training.py --meshes 1 DP8 TP2xDP4 PP2xTP2xDP2 "PP2xTP2xDP2 VP2" --models GPT gated_retention
    python benchmarks/training.py --meshes CP8 --lengths 131072 --micro-batches 1
    python benchmarks/training.py --model 1.4b --layers 12 --with-config benchmarks/experts.yaml --meshes EP4 TP2xEP2

A mesh is named by its sizes, in any order: DP and TP (with sequence parallelism), PP (VP2: interleaved, two chunks a
rank), CP, EP (data parallelism whose ranks divide the experts of --with-config). Its GPUs are the product. The
distributed optimizer is in the recipe.

For each length, precision and mesh a trial finds each model's best micro-batch and, with --tune, the flags that make it
fastest (trial.py): Megatron's GPT at its best is the peer. Then the models take turns, GPT first, --rounds times, the
trial's run being the first; a row has the median turn and the lowest and highest ratio. --stock-gpt adds the GPT of
those who use Megatron as it is, --plain-llama a Llama of plain PyTorch (plain_llama.py). A row is printed and recorded
after the model's last turn: tokens/s/GPU, TFLOP/s by the model's own causal FLOPs (no recompute, no masked half), MFU
against the vendor's peak and against a measured matrix product, peak memory, the ratio to the peers on the same mesh,
the fraction of the speed on one GPU where the call has that, too, and with context parallelism what a rank receives a
step, by formula.
Two of these may run on one host at once, each with its own CUDA_VISIBLE_DEVICES.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

from cases import (
    MODELS,
    PEERS,
    PRECISIONS,
    SCRIPTS,
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
from trial import Choice, fastest, micro_batches, tuned

PEER_NAMES = {"GPT": "Megatron", "stock_GPT": "with its own trainer, Megatron", "plain_Llama": "plain PyTorch,"}
ONE_GPU, ALONE = Mesh.of("1"), "one GPU"
HEAD = (
    f"{'model':<44} {'micro':>5} {'tokens/s':>9} {'TFLOP/s':>7} {'MFU':>6} {'of measured':>11} {'GiB':>6} {'ratio':>6} "
    f"{'of one GPU':>10}"
)


def gflop_per_token(run: Run) -> float:
    """Of a training step, as the mathematics needs them; the run's log says it (yoco_megatron/costs/flops.py)."""
    return float(re.search(r"([0-9.]+) GFLOP a token to train", run.log).group(1))


def received(model: str, length: int, precision: str, mesh: Mesh, options: argparse.Namespace) -> float | None:
    """GB a rank and step, from the others of its context; None without, or where a pipeline spreads the layers."""
    if mesh.cp == 1 or mesh.pp > 1:
        return None
    from received import received_gigabytes  # imports Megatron, which nothing else here needs

    alone = flags_of(model, length, precision, 1, ONE_GPU, options)
    return received_gigabytes(alone, mesh.cp, sequences(length, mesh, options) // mesh.dp, mesh.tp)


@dataclass(frozen=True)
class Result:
    """What one model reached on a mesh: what the trial chose, and the runs by turn."""

    model: str
    case: str
    choice: Choice
    runs: dict[int, Run]
    tokens: float
    """Of a step, on each GPU."""

    @property
    def rates(self) -> dict[int, float]:
        """tokens/s/GPU by turn."""
        return {turn: self.tokens / run.seconds for turn, run in self.runs.items()}

    @property
    def rate(self) -> float:
        """Their median."""
        return median(self.rates.values())

    @property
    def peer_name(self) -> str:
        """As rows of others name it."""
        case = " ".join([*self.case.split()[1:], *self.choice.flags.split()])
        return f"{PEER_NAMES[self.model]} {case}, micro-batch {self.choice.micro_batch}"

    def beside(self, peer: "Result") -> list[tuple[float, float]]:
        """(own, the peer's) tokens/s/GPU of the turns that both took."""
        return [(rate, peer.rates[turn]) for turn, rate in self.rates.items() if turn in peer.rates]


def report(
    result: Result, device: tuple[str, float, float], peers: list[Result], alone: float | None, output: Path,
    received_gb: float | None = None,
) -> None:  # fmt: skip
    """Print and record one model's result beside its `peers`; `alone`: tokens/s of the model on one GPU."""
    name, stated, measured = device
    run, rate = result.choice.run, result.rate
    speed = rate * gflop_per_token(run) * 1e9
    shares = [f"{speed / peak:.1%}" if peak else "" for peak in (stated, measured)]
    ratios = " ".join(f"{median(ours / theirs for ours, theirs in result.beside(peer)):.3f}" for peer in peers)
    efficiency = f"{rate / alone:.1%}" if alone else ""
    print(
        f"{HEAD}\n{result.case:<44} {result.choice.micro_batch:>5} {rate:>9,.0f} {speed / 1e12:>7.1f} {shares[0]:>6} "
        f"{shares[1]:>11} {run.peak_gib or 0:>6.1f} {ratios:>6} {efficiency:>10}"
        + (f"\nwith {result.choice.flags}" if result.choice.flags else "")
        + (f"\n{received_gb:.2f} GB received a step" if received_gb else ""),
        flush=True,
    )
    case = f"{result.case}, micro-batch {result.choice.micro_batch}"
    common = dict(benchmark="training", case=case, flags=result.choice.flags, device=name)
    throughput = dict(metric="throughput", unit="tokens/s/GPU", value=round(rate)) | common
    for peer in reversed(peers):  # the newest row is the one that is quoted: Megatron at its best
        record(output, **throughput, peer=peer.peer_name, peer_value=round(peer.rate), rounds=result.beside(peer))
    if alone:
        record(output, **throughput, peer=ALONE, peer_value=round(alone))
    if not peers and not alone:
        record(output, **throughput)
    if stated:
        record(output, metric="MFU", unit="", value=round(speed / stated, 4), **common)
    if run.peak_gib:
        record(output, metric="peak memory", unit="GiB", value=round(run.peak_gib, 2), **common)
    if received_gb:
        record(output, metric="received a step", unit="GB", value=round(received_gb, 2), **common)


def results(length: int, precision: str, mesh: Mesh, options: argparse.Namespace) -> Iterator[Result]:
    """Of each model that fits, after its last turn; GPT first."""
    tokens = sequences(length, mesh, options) * length / mesh.gpus
    found: list[Result] = []
    for model in [model for model in MODELS if model in options.models]:
        choose = tuned if model in options.tune else fastest
        if choice := choose(model, length, precision, mesh, options):
            found.append(Result(model, title(model, length, precision, mesh, options), choice, {0: choice.run}, tokens))
            if options.rounds == 1:
                yield found[-1]
    for turn in range(1, options.rounds):
        for result in found:
            size, flags = result.choice.micro_batch, result.choice.flags
            again, run = largest_that_fits(result.model, length, precision, size, mesh, options, flags)
            if isinstance(run, Run) and again == size:
                result.runs[turn] = run
            if turn == options.rounds - 1:
                yield result


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
        "--rounds", type=int, default=1, help="turns of each model; rows have the median and the spread"
    )
    parser.add_argument(
        "--tune",
        nargs="+",
        default=[],
        choices=[model for model in MODELS if model not in SCRIPTS],
        help="models whose fastest flags a trial finds first",
    )
    parser.add_argument(
        "--stock-gpt", action="store_true", help="also GPT with Megatron's trainer as it is (benchmarks/stock_gpt.py)"
    )
    parser.add_argument(
        "--plain-llama", action="store_true", help="also a Llama of plain PyTorch, with no or DP meshes"
    )
    options = parser.parse_args()
    options.models = [*options.models, *["stock_GPT"] * options.stock_gpt, *["plain_Llama"] * options.plain_llama]
    try:
        micro_batches(options.micro_batches)
    except ValueError as error:
        parser.error(str(error))
    device = measure_device()
    failed = []
    for length, precision in product(options.lengths, options.precisions):
        alone: dict[str, float] = {}
        for mesh in sorted(options.meshes, key=lambda mesh: mesh.gpus):  # one GPU first, others compare with it
            done: dict[str, Result] = {}
            for result in results(length, precision, mesh, options):
                model = result.model
                peers = [done[peer] for peer in PEERS if peer in done and model not in PEERS]
                moved = received(model, length, precision, mesh, options)
                report(result, device, peers, alone.get(model), options.output, moved)
                done[model] = result
            if mesh == ONE_GPU:
                alone = {model: result.rate for model, result in done.items()}
            failed += [title(model, length, precision, mesh, options) for model in options.models if model not in done]
    if failed:
        raise SystemExit(f"no result for {', '.join(failed)}")


if __name__ == "__main__":
    main()
