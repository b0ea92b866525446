"""Norm, SwiGLU's backward and RoPE of the 3B, as YOCO runs them, beside Transformer Engine's and Megatron's.

    python benchmarks/elementwise.py                               # one GPU, half a minute
    python benchmarks/elementwise.py --tokens 16384 --hidden-size 2048 --ffn-hidden-size 5632 --heads 16

Caches are emptied before each run, the median counts. Prints microseconds and the share of the speed at which the same
GPU copies memory, every value counted once as read or written.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from record import record
from runs import ROOT

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

prepare()

import torch
import triton.testing
from torch import Tensor

EPS, TRANSFORMER_ENGINE = 1e-5, "Transformer Engine's kernel"
CUDNN = "NVTE_NORM_FWD_USE_CUDNN", "NVTE_NORM_BWD_USE_CUDNN"  # asked once in a process


@dataclass
class Result:
    """Microseconds of one operation, ours and the peer's; `values`: what it must read and write of a token."""

    name: str
    width: int
    values: int
    ours: float
    peer: str
    peers: float


def microseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median") * 1e3


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def norm_times(options: argparse.Namespace) -> list[float]:
    """[forward, backward] of Transformer Engine's RMSNorm."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex

    x, dy, weight = *(random(options.tokens, options.hidden_size) for _ in range(2)), random(options.hidden_size)
    kind = te.constants.TE_DType[torch.bfloat16]

    def forward() -> tuple:
        return tex.rmsnorm_fwd(x, weight, EPS, None, None, kind, 0, False)

    rsigma = forward()[2]
    return [microseconds(forward), microseconds(lambda: tex.rmsnorm_bwd(dy, x, rsigma, weight, 0, False))]


def norm(options: argparse.Namespace) -> list[Result]:
    """cuDNN's, as training sets it, beside Transformer Engine's default in a process of its own."""
    command = [sys.executable, *sys.argv, "--only-norm-times"]
    default = os.environ | dict.fromkeys(CUDNN, "0")
    run = subprocess.run(command, env=default, stdout=subprocess.PIPE, text=True, check=True)
    peers = [float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("NORM ")]
    os.environ.update(dict.fromkeys(CUDNN, "1"))
    width = options.hidden_size
    return [
        Result(f"RMSNorm {name}", width, passes * width, ours, TRANSFORMER_ENGINE, peer)
        for name, passes, ours, peer in zip(("forward", "backward"), (2, 3), norm_times(options), peers)
    ]


def swiglu_backward(options: argparse.Namespace) -> Result:
    from megatron.core.fusions.fused_bias_swiglu import swiglu_back

    from yoco_megatron.ops.fused.swiglu import fused_swiglu

    width = options.ffn_hidden_size
    wide, dy = random(options.tokens, 2 * width).requires_grad_(), random(options.tokens, width)
    y = fused_swiglu(wide)
    ours = microseconds(lambda: torch.autograd.grad(y, wide, dy, retain_graph=True))
    theirs = microseconds(lambda: swiglu_back(dy, wide.detach()))
    return Result("SwiGLU backward", width, 5 * width, ours, "Megatron", theirs)


def rope(options: argparse.Namespace) -> Result:
    """Of a cross-decoder layer's queries, forward; backward is the same kernel."""
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb

    from yoco_megatron.ops.fused.rotary import rotate

    width = options.heads * options.head_dim
    x = random(options.tokens // options.micro_batch, options.micro_batch, options.heads, options.head_dim)
    angles = torch.randn(len(x), 1, 1, options.head_dim // 2, device="cuda").repeat_interleave(2, -1)
    ours = microseconds(lambda: rotate(x, angles))
    theirs = microseconds(lambda: fused_apply_rotary_pos_emb(x, angles, interleaved=True))
    return Result("RoPE", width, 2 * width, ours, TRANSFORMER_ENGINE, theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--micro-batch", type=int, default=2, help="sequences that the tokens are of")
    parser.add_argument("--hidden-size", type=int, default=3072)
    parser.add_argument("--ffn-hidden-size", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--only-norm-times", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    if not runtime.has_gpu():
        parser.error("this benchmark needs a GPU")
    if options.only_norm_times:
        for time in norm_times(options):
            print("NORM", time)
        return
    device = torch.cuda.get_device_name()
    copied = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    copy_speed = 2 * copied.nbytes / microseconds(copied.clone)  # bytes a microsecond
    print(f"{options.tokens} tokens, bf16, {device}, copies {copy_speed / 1e6:.2f} TB/s")
    for result in [*norm(options), swiglu_backward(options), rope(options)]:
        floor = 2 * result.values * options.tokens / copy_speed
        print(
            f"{result.name:<18} {result.ours:>7.1f} us, {floor / result.ours:>4.0%} of a copy's speed; "
            f"{result.peer} {result.peers:.1f} us, {floor / result.peers:.0%}",
            flush=True,
        )
        record(
            options.output,
            benchmark="elementwise",
            case=f"{result.name}, {options.tokens} x {result.width} bf16",
            metric="time",
            unit="us",
            value=round(result.ours, 1),
            device=device,
            peer=result.peer,
            peer_value=round(result.peers, 1),
            higher_is_better=False,
        )


if __name__ == "__main__":
    main()
