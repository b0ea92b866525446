"""Attention of one context-parallel rank, kernel by kernel: how fast is a mask in the corner of a rectangle?

    python benchmarks/chunk_attention.py --tokens 65536          # one GPU, half a minute

Of a sequence over two ranks, rank by rank: Transformer Engine's attention, one call for each chunk with a bottom-right
causal mask, beside one causal square and an unmasked rectangle, joined (model/two_chunk_attention.py). Also the whole
sequence on one GPU by either library. TFLOP/s count what the masks let through, forward twice and backward 2.5 times,
as under full recompute; bf16, heads of the 3B model.
"""

import argparse

from yoco_megatron import runtime

runtime.prepare()

import torch
from torch import Tensor
from triton.testing import do_bench

from yoco_megatron.ops.attention import partial

HEADS, GROUPS, WIDTH = 24, 8, 128
SCALE = WIDTH**-0.5


def tensors(queries: int, keys: int) -> list[Tensor]:
    """q, k, v as the cross-decoder has them: [s, 1, heads, D], keys and values interleaved."""
    q = torch.randn(queries, 1, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(keys, 1, GROUPS, 2, WIDTH, device="cuda", dtype=torch.bfloat16)
    return [q, kv[..., 0, :], kv[..., 1, :]]


def transformer_engine(queries: int, keys: int) -> tuple[float, float]:
    """Milliseconds of forward, of backward; the queries stand at the end of the keys."""
    from transformer_engine.pytorch import DotProductAttention

    attention = DotProductAttention(
        HEADS, WIDTH, num_gqa_groups=GROUPS, attention_dropout=0.0, qkv_format="sbhd", attention_type="cross"
    )
    q, k, v = (x.requires_grad_() for x in tensors(queries, keys))
    mask = "causal" if queries == keys else "causal_bottom_right"
    do = torch.randn(queries, 1, HEADS * WIDTH, device="cuda", dtype=torch.bfloat16)
    forward = do_bench(lambda: attention(q, k, v, attn_mask_type=mask))
    # Its graph does not survive a backward: each time a fresh one.
    both = do_bench(lambda: torch.autograd.grad(attention(q, k, v, attn_mask_type=mask), (q, k, v), do))
    return forward, both - forward


def torch_part(queries: int, keys: int, causal: bool) -> tuple[float, float]:
    """Milliseconds of forward, of backward of one part of the keys."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in tensors(queries, keys))
    o, lse, seen = partial.forward(q, k, v, causal, SCALE)
    forward = do_bench(lambda: partial.forward(q, k, v, causal, SCALE))
    return forward, do_bench(lambda: partial.backward(o, q, k, v, o, lse, seen, causal, SCALE))


def report(name: str, pairs: int, times: list[tuple[float, float]]) -> None:
    forward, backward = (sum(column) for column in zip(*times))
    flops = 4 * pairs * HEADS * WIDTH * (2 + 2.5)
    total = 2 * forward + backward
    print(f"{name:<52} {forward:8.2f} {backward:8.2f} {total:8.2f} {flops / total / 1e9:8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    tokens = parser.parse_args().tokens
    chunk = tokens // 4
    print(f"{torch.cuda.get_device_name()}, {tokens} tokens\n{'':<52} {'fwd ms':>8} {'bwd ms':>8} {'layer':>8} TFLOP/s")
    report("one GPU, Transformer Engine", tokens**2 // 2, [transformer_engine(tokens, tokens)])
    report("one GPU, torch's cuDNN", tokens**2 // 2, [torch_part(tokens, tokens, True)])
    for rank in (0, 1):
        ends = [(index + 1) * chunk for index in (rank, 3 - rank)]
        report(f"rank {rank}, a call for each chunk", tokens**2 // 4, [transformer_engine(chunk, end) for end in ends])
        other = (chunk, 2 * chunk) if rank == 0 else (2 * chunk, chunk)
        parts = [torch_part(2 * chunk, 2 * chunk, True), torch_part(*other, False)]
        report(f"rank {rank}, square and rectangle, not yet joined", tokens**2 // 4, parts)
    q = tensors(2 * chunk, 1)[0].permute(1, 2, 0, 3)
    lse = torch.randn(q.shape[:3], device="cuda")
    print(f"{'to join all rows of a rank':<52} {do_bench(lambda: partial.join(q, lse, q, lse)):8.2f}")


if __name__ == "__main__":
    main()
