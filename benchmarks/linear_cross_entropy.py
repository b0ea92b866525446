"""The output layer and the loss, forward and backward: in chunks beside Megatron's whole logits, time and peak memory.

    python benchmarks/linear_cross_entropy.py                               # one GPU, under a minute
    python benchmarks/linear_cross_entropy.py --tokens 32768 --chunks 4096 8192

Both add the weight's gradient to an fp32 buffer, as in training. Megatron's loss runs as it is by default and with
--cross-entropy-loss-fusion; the faster is the peer. Peak memory is beyond input, weight, buffer and the input's
gradient. Goals: at most 3% over the peer's time, and less than 2 GB at 32,768 tokens.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from record import record
from runs import ROOT

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

prepare()

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from yoco_megatron.ops.linear_cross_entropy import linear_cross_entropy

REPEATS = 10
Step = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(x [N, h], weight [V, h], labels [N], main_grad fp32 [V, h]): forward, backward, gradients added."""


def megatron_step(cross_entropy: Callable, group: dist.ProcessGroup) -> Step:
    """Whole logits; `cross_entropy` is one of Megatron's."""

    def step(x: Tensor, weight: Tensor, labels: Tensor, main_grad: Tensor) -> None:
        logits = (x @ weight.t()).unsqueeze(1)
        loss = cross_entropy(logits, labels.unsqueeze(1), group)
        del logits
        loss.sum().backward()
        main_grad.add_(weight.grad)

    return step


def chunked_step(chunk_size: int) -> Step:
    def step(x: Tensor, weight: Tensor, labels: Tensor, main_grad: Tensor) -> None:
        linear_cross_entropy(x, weight, labels, chunk_size, main_grad=main_grad)[0].sum().backward()

    return step


def measure(name: str, step: Step, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, float] | None:
    """(milliseconds of the median run, GB of the peak), printed; None where memory is short."""
    main_grad = torch.zeros_like(weight, dtype=torch.float32)

    def once() -> None:
        step(x, weight, labels, main_grad)
        x.grad = weight.grad = None

    times = []
    try:
        for _ in range(3):
            once()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        peak = (torch.cuda.max_memory_allocated() - before - x.nbytes) / 1e9
        for _ in range(REPEATS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            once()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
    except torch.cuda.OutOfMemoryError:
        x.grad = weight.grad = None
        torch.cuda.empty_cache()
        print(f"{name:<28} out of memory", flush=True)
        return None
    milliseconds = sorted(times)[REPEATS // 2]
    tflops = 6 * len(x) * weight.numel() / milliseconds / 1e9
    print(f"{name:<28} {milliseconds:>8.2f} ms {tflops:>5.0f} TFLOP/s (three products) {peak:>6.2f} GB", flush=True)
    return milliseconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--hidden-size", type=int, default=3072)
    parser.add_argument("--vocab-size", type=int, default=100_352)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    if not runtime.has_gpu():
        parser.error("this benchmark needs a GPU")
    device = torch.cuda.get_device_name()
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    group = dist.group.WORLD
    steps = {
        "Megatron": megatron_step(lambda *args: vocab_parallel_cross_entropy(*args[:2], tp_group=args[2]), group),
        "Megatron, fused loss": megatron_step(fused_vocab_parallel_cross_entropy, group),
    }
    for tokens in options.tokens:
        print(f"\n{tokens} tokens, hidden {options.hidden_size}, vocabulary {options.vocab_size}, bf16, {device}")
        x = torch.randn(tokens, options.hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(options.vocab_size, options.hidden_size, device="cuda", dtype=torch.bfloat16)
        weight = weight.mul_(0.02).requires_grad_()
        labels = torch.randint(0, options.vocab_size, (tokens,), device="cuda")
        whole = [result for name, step in steps.items() if (result := measure(name, step, x, weight, labels))]
        for chunk in options.chunks:
            ours = measure(f"chunks of {chunk}", chunked_step(chunk), x, weight, labels)
            if ours is None:
                continue
            case = f"{tokens} x {options.hidden_size} x {options.vocab_size} bf16, chunks of {chunk}"
            common = dict(benchmark="loss", case=case, device=device, higher_is_better=False, peer="Megatron")
            for metric, unit, which in (("fwd_bwd", "ms", 0), ("peak memory", "GB", 1)):
                peer = min((result[which] for result in whole), default=None)
                record(options.output, metric=metric, unit=unit, value=round(ours[which], 3), peer_value=peer, **common)
        del x, weight
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
