"""Decoding with the shared K,V in bf16, int8 and FP8 by turns, and its share of what the memory's bandwidth allows.

    python benchmarks/decoding.py                                   # the 3B at 32,768 tokens, batch 64, one GPU
    python benchmarks/decoding.py --length 524288 --batch 4

With random weights and a cache of noise. A step must read each weight but the embedding once, each sequence's K,V once
in every cross-decoder layer, and its windows; and read and write its retention states. These bytes, by the speed at
which the device sums up a large tensor, are the bound.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from inference import NEW, build, clear, decode, fuse, pretend, sync
from record import record

from yoco_megatron import runtime
from yoco_megatron.inference.cache import GlobalKV, RetentionState, WindowKV
from yoco_megatron.inference.engine import Engine

KINDS = ("bf16", "int8", "fp8")


def bytes_of_step(engine: Engine, length: int) -> float:
    """That a step has to move."""
    model, kinds = engine.model, engine.model.config.kv_sharing_modes
    moved = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    readers = len(model.model.cross_layers) / kinds.count("store")
    for layer in engine.cache.layers:
        held = sum(tensor.nbytes for tensor in layer.tensors())
        if isinstance(layer, GlobalKV):
            held *= readers * length / (len(layer.blocks) * engine.cache.capacity)
        moved += held * (2 if isinstance(layer, RetentionState) else isinstance(layer, GlobalKV | WindowKV))
    return moved


def read_speed(device: torch.device, size: int) -> float:
    """Bytes a second of a sum over `size` bytes."""
    x = torch.ones(size // 4, device=device)
    times = []
    for _ in range(12):
        started = sync(device)
        x.sum()
        times.append(sync(device) - started)
    return x.nbytes / median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3b", help="of configs/model")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; the median counts")
    parser.add_argument("--steps", type=int, default=32, help="timed in a turn, at most")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.jsonl"))
    options = parser.parse_args()
    device = torch.device("cuda" if runtime.has_gpu() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    speed = read_speed(device, 2**32 if device.type == "cuda" else 2**26)
    model = build(options.model, False, device)
    if device.type == "cuda":
        fuse(model)
    seconds: dict[str, list[float]] = {kind: [] for kind in options.kinds}
    for turn in range(options.rounds):
        for kind in options.kinds:
            engine = Engine(model, options.length + NEW, kv_cache_dtype=None if kind == "bf16" else kind)
            pretend(engine, options.batch, options.length, device)
            seconds[kind].append(decode(engine, options.batch, options.steps, device))
            if turn == options.rounds - 1:
                report(kind, engine, seconds, speed, name, options)
            del engine
            clear(device.type == "cuda")


def report(
    kind: str, engine: Engine, seconds: dict[str, list[float]], speed: float, device: str, options: argparse.Namespace
) -> None:
    """Print and record what all turns of one kind come to."""
    rates = {name: [options.batch / value for value in values] for name, values in seconds.items()}
    moved, cache = bytes_of_step(engine, options.length), engine.nbytes()
    share = moved / median(seconds[kind]) / speed
    print(
        f"{kind}: {median(rates[kind]):,.1f} tokens/s ({min(rates[kind]):,.1f} to {max(rates[kind]):,.1f}), cache "
        f"{cache / 1e9:.2f} GB, {moved / 1e9:.1f} GB a step, {share:.1%} of {speed / 1e12:.2f} TB/s",
        flush=True,
    )
    case = dict(
        benchmark="decoding", case=f"{options.model} {options.length} {kind}, batch {options.batch}", device=device
    )
    peer: dict[str, Any] = {}
    if kind != "bf16" and "bf16" in rates:
        turns = list(zip(rates[kind], rates["bf16"]))
        peer = dict(peer="bf16", peer_value=round(median(rates["bf16"]), 1), rounds=turns)
    record(options.output, **case, metric="decode", unit="tokens/s", value=round(median(rates[kind]), 1), **peer)
    record(options.output, **case, metric="share of the read bandwidth", unit="", value=round(share, 4))
    record(options.output, **case, metric="cache", unit="GB", value=round(cache / 1e9, 4))


if __name__ == "__main__":
    main()
