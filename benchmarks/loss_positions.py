"""A loss on the last tokens of long sequences: the cross-decoder there alone, beside all positions, and Megatron's GPT.

    python benchmarks/loss_positions.py --layers 8 --length 131072 --suffix 4096     # one GPU, about four minutes
    python benchmarks/loss_positions.py --length 32768 --suffix 4096                 # all 26 layers
    python benchmarks/loss_positions.py --length 131072 --suffix 4096 --meshes CP4 --models gated_retention --keep \
        --batch-tokens 131072 --travels keys queries        # four GPUs, four sequences a step

The runs take turns, --rounds times: GPT, whose head and loss are spared where there is no loss, as a Transformer can;
then each YOCO at all positions and at those with a loss, with context parallelism in each way of --travels. All with
full recompute, unless --recompute says otherwise where only positions with a loss are computed: there is more memory
left. One row for each comparison, of the medians; and the ratio of FLOPs, which is what could be won.
"""

import argparse
from statistics import median

from cases import add_arguments, flags_of, measure_device, sequences, title
from mesh import Mesh
from record import record
from runs import Run, attempt
from training import gflop_per_token

RECOMPUTE = {
    "full": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "selective": "--recompute-granularity selective --recompute-modules mlp layernorm",
    "elementwise": "--recompute-elementwise",
}
ALL, SOME = "all positions", "positions with loss"
SPARED = "head and loss spared"  # of the GPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--suffix", default="4096", help="as --loss-suffix")
    parser.add_argument("--meshes", nargs="+", type=Mesh.of, default=[Mesh.of("1")], help="1, CP4, TP2xCP2, ...")
    parser.add_argument("--rotary-base", type=int, default=1_000_000)
    parser.add_argument("--positions", nargs="+", choices=["all", "loss"], default=["all", "loss"])
    parser.add_argument(
        "--travels", nargs="+", choices=["auto", "keys", "queries"], default=["auto"], help="as --cp-cross-attention"
    )
    parser.add_argument("--recompute", choices=list(RECOMPUTE), default="full", help="at positions with loss")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="with full recompute YOCO stores its attention outputs")
    options = parser.parse_args()
    options.chunk_gpt_loss = True
    device = measure_device()[0]
    ways = ways_of_yoco(options)
    for mesh in options.meshes:
        cases = [
            (model, how)
            for model in options.models
            for how in (ways if model != "GPT" else {SPARED: RECOMPUTE["full"]})
        ]
        runs: dict[tuple[str, str], list[Run]] = {case: [] for case in cases}
        for _ in range(options.rounds):
            for model, how in cases:
                flags = flags_of(model, options.length, "bf16", 1, mesh, options)
                more = f"--rotary-base {options.rotary_base} --loss-suffix {options.suffix} "
                more += RECOMPUTE["full"] if model == "GPT" else ways[how]
                run = attempt(name_of(model, how, mesh, options), f"{flags} {more}", mesh.gpus, options.timeout, True)
                if isinstance(run, Run):
                    runs[model, how].append(run)
        report(runs, mesh, device, options)


def ways_of_yoco(options: argparse.Namespace) -> dict[str, str]:
    """Name -> flags."""
    kept = " --keep-cross-attention" if options.keep else ""
    ways = {}
    if "all" in options.positions:
        ways[ALL] = f"--cross-decoder-positions all {RECOMPUTE['full']}{kept}"
    for way in options.travels if "loss" in options.positions else ():
        name = SOME if way == "auto" else f"{SOME}, {way} travel"
        name += "" if options.recompute == "full" else f", recompute {options.recompute}"
        ways[name] = f"--cp-cross-attention {way} {RECOMPUTE[options.recompute]}"
        ways[name] += kept if options.recompute == "full" else ""
    return ways


def name_of(model: str, how: str, mesh: Mesh, options: argparse.Namespace) -> str:
    """The case, as results name it."""
    name = f"{title(model, options.length, 'bf16', mesh, options)}, loss on the last {options.suffix}, {how}"
    return name if options.batch_tokens == 32768 else f"{name}, {sequences(options.length, mesh, options)} sequences"


def report(
    runs: dict[tuple[str, str], list[Run]], mesh: Mesh, device: str, options: argparse.Namespace
) -> None:  # fmt: skip
    """Print and record each case beside all positions and beside GPT."""
    tokens = sequences(options.length, mesh, options) * options.length
    seconds = {case: median(run.seconds for run in done) for case, done in runs.items() if done}
    for (model, how), value in seconds.items():
        done = runs[model, how]
        name, flop = name_of(model, how, mesh, options), gflop_per_token(done[0]) * 1e9 * tokens
        peak = max(run.peak_gib or 0 for run in done)
        print(
            f"{name}: {value * 1e3:,.0f} ms a step of {tokens:,} tokens, of {len(done)} runs, {flop / 1e15:.3f} PFLOP, "
            f"{flop / value / mesh.gpus / 1e12:.0f} TFLOP/s a GPU, {peak:.1f} GiB",
            flush=True,
        )
        step = dict(benchmark="loss_positions", case=name, device=f"{mesh.gpus}x {device}")
        time = dict(metric="time a step", unit="ms", value=round(value * 1e3, 1), higher_is_better=False) | step
        peers = {peer: seconds[peer] for peer in ((model, ALL), ("GPT", SPARED)) if peer in seconds}
        peers.pop((model, how), None)
        for peer, peer_value in peers.items():
            possible = gflop_per_token(runs[peer][0]) * 1e9 * tokens / flop
            print(f"   {peer_value / value:.2f} times as fast as {' '.join(peer)}; FLOPs: {possible:.2f}", flush=True)
            record(options.output, **time, peer=name_of(*peer, mesh, options), peer_value=round(peer_value * 1e3, 1))
        if not peers:
            record(options.output, **time)
        if peak:
            record(options.output, metric="peak memory", unit="GiB", value=round(peak, 2), **step)


if __name__ == "__main__":
    main()
