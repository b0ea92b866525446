"""Gated retention: our kernels against flash-linear-attention's, and against what the memory allows.

    python benchmarks/retention.py            # one Hopper GPU, about four minutes, most of it compiling

fla's gated backward refuses to run with Triton 3.4 to 3.7.0 on Hopper (its authors found wrong results there); the
guard is lifted for timing only. fla tunes itself at the first call. The floor is the larger of bytes (q, k, v, o; again
for the gradients, each read or written once) over the measured copy rate, and FLOPs at chunks of 64 over the measured
bf16 matrix rate.
"""

import argparse
import time
from pathlib import Path

import torch
import triton
from record import record

from yoco_megatron.ops.gated_retention import gated_retention, log_decay_from_logits

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {  # name: B, T, H, D
    "H=24 D=128 8x4096": (8, 4096, 24, 128),
    "H=24 D=128 1x32768": (1, 32768, 24, 128),
    "H=24 D=128 1x131072": (1, 131072, 24, 128),
    "H=3 D=128 1x32768": (1, 32768, 3, 128),
    "H=12 D=256 8x4096": (8, 4096, 12, 256),
}


def milliseconds(run, repetitions: int = 100) -> float:
    """Time on the GPU, from replays of a captured graph: launches hide, as they do behind a model's other layers."""
    return triton.testing.do_bench_cudagraph(run, rep=repetitions, return_mode="median")


def host_milliseconds(run, repetitions: int = 20) -> float:
    """Time that Python and the driver take to launch `run`."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repetitions):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repetitions * 1e3


def copy_rate() -> float:
    """Bytes read plus written a second by a large copy on the device."""
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def matrix_rate() -> float:
    """bf16 FLOP/s of a large matrix product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3


def floors(B: int, T: int, H: int, D: int, bandwidth: float, rate: float) -> dict[str, tuple[float, float, float]]:
    """(milliseconds, bytes, FLOPs) of "fwd" and "fwd_bwd"; docs/kernels.md derives them."""
    tokens = B * T * H
    work = {"fwd": (8 * D, 4 * 64 * D + 4 * D * D), "fwd_bwd": (22 * D, 14 * 64 * D + 14 * D * D)}
    return {
        name: (max(tokens * size / bandwidth, tokens * flops / rate) * 1e3, tokens * size, tokens * flops)
        for name, (size, flops) in work.items()
    }


def fla_run():
    """fla's chunk_simple_gla with our arguments, or None where fla is not installed."""
    try:
        from fla.ops.common import chunk_o
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    chunk_o.TRITON_ABOVE_3_7_1 = True  # lifts the guard
    return lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g, scale=q.shape[-1] ** -0.5)[0]


def passes(run, B: int, T: int, H: int, D: int):
    """The forward pass alone, and forward with backward, as functions without arguments."""
    q, k, v, do = (torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    g = log_decay_from_logits(torch.randn(B, T, H, device="cuda"))
    leaves = [x.requires_grad_() for x in (q, k, v, g)]

    def forward():
        with torch.no_grad():
            run(*leaves)

    def both():
        for x in leaves:
            x.grad = None
        run(*leaves).backward(do)

    return {"fwd": forward, "fwd_bwd": both}


def mixer_passes(B: int, T: int, H: int, D: int):
    """The whole mixer, fused, and as the chain of its parts around the same retention kernel (rotation by TE)."""
    from yoco_megatron.ops.fused.retention_mixer import mix

    qkvg = torch.randn(T, B, H * 4 * D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    logits = torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn(T, B, H * D, device="cuda", dtype=torch.bfloat16)
    angles = (torch.arange(T, device="cuda")[:, None] * torch.logspace(0, -4, D // 2, device="cuda")).float()
    angles = angles.repeat_interleave(2, -1)[:, None, None]

    def fused():
        return mix(qkvg.view_as(qkvg), logits, angles, tau=16.0, eps=1e-5)

    def parts():
        q, k, v, gate = qkvg.unflatten(-1, (-1, 4, D)).unbind(3)
        q, k = (rotate(x, angles) for x in (q, k))
        log_decay = log_decay_from_logits(logits)
        o = gated_retention(*(x.transpose(0, 1) for x in (q, k, v, log_decay)))[0].transpose(0, 1)
        return (torch.nn.functional.silu(gate) * rms_norm(o, 1e-5)).flatten(2)

    def timed(run):
        def both():
            qkvg.grad = logits.grad = None
            run().backward(dy)

        return both

    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    from yoco_megatron.model.layers.norm import rms_norm

    def rotate(x, angles):
        return apply_rotary_pos_emb(x, angles, tensor_format="sbhd", interleaved=True, fused=True)

    return timed(fused), timed(parts)


def compare_mixer(shape: str, device: str, output: Path) -> None:
    fused, parts = mixer_passes(*SHAPES[shape])
    milli, peer = milliseconds(fused), milliseconds(parts)
    milli = (milli + milliseconds(fused)) / 2
    print(f"{shape:<22} whole mixer fwd_bwd {milli:.3f} ms, its parts unfused {peer:.3f} ms, {peer / milli:.2f}x")
    record(
        output, benchmark="retention", case=f"{shape} mixer fwd_bwd", metric="time", unit="ms", value=round(milli, 4),
        peer="unfused parts, same retention kernel", peer_value=round(peer, 4), device=device, higher_is_better=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--no-peer", action="store_true", help="leave fla out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    bandwidth, rate = copy_rate(), matrix_rate()
    device = torch.cuda.get_device_name()
    print(f"{device}: copy {bandwidth / 1e12:.2f} TB/s, matrix product {rate / 1e12:.0f} TFLOP/s")
    if next(iter(SHAPES)) in options.shapes:
        compare_mixer(next(iter(SHAPES)), device, options.output)
    print(
        f"{'shape':<22} {'pass':<8} {'ms':>7} {'floor':>7} {'% floor':>7} {'TB/s':>5} {'TFLOP/s':>7} {'host ms':>7} "
        f"{'fla ms':>7} {'x':>5}"
    )
    fla = None if options.no_peer else fla_run()
    for shape in options.shapes:
        ours = passes(lambda *x: gated_retention(*x)[0], *SHAPES[shape])
        peers = passes(fla, *SHAPES[shape]) if fla else {}
        for name, (floor, size, flops) in floors(*SHAPES[shape], bandwidth, rate).items():
            milli = milliseconds(ours[name])
            peer = milliseconds(peers[name]) if fla else None
            # Before and after the peer, so that a drifting clock favours neither.
            milli = (milli + milliseconds(ours[name])) / 2
            print(
                f"{shape:<22} {name:<8} {milli:7.3f} {floor:7.3f} {floor / milli:7.0%} {size / milli / 1e9:5.2f} "
                f"{flops / milli / 1e9:7.0f} {host_milliseconds(ours[name]):7.3f} "
                + (f"{peer:7.3f} {peer / milli:5.2f}" if peer else ""),
                flush=True,
            )
            common = dict(
                benchmark="retention", case=f"{shape} {name}", unit="ms", device=device, higher_is_better=False
            )
            record(
                options.output, metric="time", value=round(milli, 4), **common,
                peer="fla chunk_simple_gla" if peer else None, peer_value=round(peer, 4) if peer else None,
            )  # fmt: skip
            record(
                options.output, metric="time", value=round(milli, 4), **common, peer="floor", peer_value=round(floor, 4)
            )
        del ours, peers
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
