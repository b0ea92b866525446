"""Training speed of YOCO beside Megatron's GPT of the same hidden size, layers, heads, FFN, vocabulary, flags and data.

    python benchmarks/training.py --lengths 4096 --precisions bf16 delayed      # one GPU, about ten minutes

For each length and precision the models take turns, each at every micro-batch of --micro-batches; the best one that
fits counts. Prints tokens/s/GPU, TFLOP/s by the model's own causal FLOPs (no recompute, no masked half), MFU against
the vendor's peak and against a measured matrix product, peak memory, and the ratio to GPT.
"""

import argparse
from pathlib import Path

from record import record
from runs import ROOT, Run, train

from yoco_megatron import runtime

runtime.prepare()

import torch
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from yoco_megatron.config import arguments
from yoco_megatron.config.shape import ModelShape
from yoco_megatron.training.flops import train_flops

MODELS = {"gated_retention": "yoco_{}", "sliding_window": "yoco_{}_swa", "GPT": "transformer_{}"}
PRECISIONS = {
    "bf16": "",
    "delayed": "--fp8-format hybrid --fp8-recipe delayed",
    "tensorwise": "--fp8-format hybrid --fp8-recipe tensorwise",
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
}
# bf16 matrix units without sparsity, by the vendor's data sheet.
STATED_PEAK = {"H100": 989e12, "H200": 989e12}


def flags_of(model: str, length: int, precision: str, options: argparse.Namespace) -> str:
    chunk = f"--loss-chunk-size {options.loss_chunk_size}" if model != "GPT" and options.loss_chunk_size else ""
    return (
        f"--config configs/model/{MODELS[model].format(options.model)}.yaml configs/recipe/scaling.yaml "
        f"--seq-length {length} --max-position-embeddings {length} --vocab-size {options.vocab_size} "
        f"--global-batch-size {max(1, options.batch_tokens // length)} --exit-interval {options.steps} "
        f"{f'--num-layers {options.layers}' if options.layers else ''} {PRECISIONS[precision]} {chunk} "
        f"{options.flags if model != 'GPT' else options.gpt_flags}"
    )


def flops_per_token(flags: str, length: int) -> float:
    """Of a training step, as the mathematics needs them (yoco_megatron/training/flops.py)."""
    args = arguments.parse(f"{flags} --mock-data --tokenizer-type NullTokenizer --micro-batch-size 1".split())
    if args.padded_vocab_size is None:
        build_tokenizer(args)
    return train_flops(ModelShape.from_args(args), 1) / length


def measured_peak() -> float:
    """bf16 FLOP/s of a large matrix product, 0 without a GPU."""
    if not runtime.has_gpu():
        return 0.0
    import triton

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / triton.testing.do_bench(lambda: a @ b, return_mode="median") * 1e3


def compare(length: int, precision: str, peaks: dict[str, float], device: str, options: argparse.Namespace) -> None:
    best: dict[str, tuple[int, Run]] = {}
    for micro_batch in options.micro_batches:
        for model in options.models:
            flags = f"{flags_of(model, length, precision, options)} --micro-batch-size {micro_batch}"
            run = train(f"{model} {length} {precision} micro-batch {micro_batch}", flags, 1, options.timeout)
            if run and (model not in best or run.seconds < best[model][1].seconds):
                best[model] = micro_batch, run
    tokens = max(1, options.batch_tokens // length) * length
    peer = best.get("GPT")
    head = f"{'model':<16} {'micro':>5} {'tokens/s':>9} {'TFLOP/s':>7} {'MFU':>6} {'of measured':>11}"
    print(f"\n{head} {'GiB':>6} {'ratio':>6}")
    for model, (micro_batch, run) in best.items():
        rate = tokens / run.seconds
        speed = rate * flops_per_token(flags_of(model, length, precision, options), length)
        shares = [f"{speed / peak:.1%}" if peak else "" for peak in peaks.values()]
        ratio = f"{peer[1].seconds / run.seconds:.3f}" if peer and model != "GPT" else ""
        print(
            f"{model:<16} {micro_batch:>5} {rate:>9,.0f} {speed / 1e12:>7.0f} {shares[0]:>6} {shares[1]:>11} "
            f"{run.peak_gib or 0:>6.1f} {ratio:>6}"
        )
        if model == "GPT":
            continue
        common = dict(benchmark="training", case=f"{options.model} {model} {length} {precision}", device=device)
        name = f"Megatron GPT, micro-batch {peer[0]} (ours {micro_batch})" if peer else None
        peer_rate = round(tokens / peer[1].seconds) if peer else None
        record(
            options.output, metric="throughput", unit="tokens/s/GPU", value=round(rate), peer=name,
            peer_value=peer_rate, **common,
        )  # fmt: skip
        if peaks["stated"]:
            record(options.output, metric="MFU", unit="", value=round(speed / peaks["stated"], 4), **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3b")
    parser.add_argument("--layers", type=int, help="fewer layers, alike in all models")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096])
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["bf16"])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens a step")
    parser.add_argument("--vocab-size", type=int, default=100_350)
    parser.add_argument("--loss-chunk-size", type=int, default=0, help="of ours; GPT has no such flag")
    parser.add_argument("--flags", default="", help="more flags for YOCO")
    parser.add_argument("--gpt-flags", default="", help="more flags for GPT")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one run")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if runtime.has_gpu() else "CPU"
    stated = next((peak for name, peak in STATED_PEAK.items() if name in device), 0.0)
    peaks = {"stated": stated, "measured": measured_peak()}
    print(f"{device}: peak {stated / 1e12:.0f} TFLOP/s stated, {peaks['measured'] / 1e12:.0f} measured")
    for length in options.lengths:
        for precision in options.precisions:
            compare(length, precision, peaks, device, options)


if __name__ == "__main__":
    main()
