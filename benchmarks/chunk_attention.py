"""Attention of one context-parallel rank, kernel by kernel: how fast is a mask in the corner of a rectangle?

    python benchmarks/chunk_attention.py --tokens 65536          # one GPU, half a minute
    python benchmarks/chunk_attention.py --tokens 65536 --window 1024

Of a sequence over two ranks, rank by rank: Transformer Engine's attention, one call for each chunk with a bottom-right
causal mask, beside one causal square and an unmasked rectangle, merged (zigzag_attention.py). With a window,
of a rank's two chunks and the keys before them: such calls, beside squares, for which padding queries precede the
chunk's own; each also with one padding key, which makes their number a multiple of 128. Both beside the whole
sequence on one GPU, of which a rank has half. TFLOP/s count what the masks let through, forward twice and backward 2.5
times, as under full recompute; bf16, heads of the 3B model, which has no groups in its windows.
"""

import argparse
from pathlib import Path

from record import record
from runs import ROOT

from yoco_megatron import runtime
from yoco_megatron.startup.prepare import prepare

prepare()

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench

from yoco_megatron.ops.attention import partial

HEADS, GROUPS, WIDTH = 24, 8, 128
SCALE = WIDTH**-0.5


def tensors(queries: int, keys: int, groups: int = GROUPS) -> list[Tensor]:
    """q, k, v [s, 1, heads, D], keys and values interleaved, as the cross-decoder has them; in groups of one, apart."""
    q = torch.randn(queries, 1, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(keys, 1, groups, 2, WIDTH, device="cuda", dtype=torch.bfloat16)
    k, v = kv.unbind(3)
    return [q, k, v] if groups < HEADS else [q, k.contiguous(), v.contiguous()]


def transformer_engine(
    queries: int, keys: int, window: int | None = None, surplus: int = 0, square: bool = False
) -> tuple[float, float]:
    """Milliseconds of forward, of backward; the queries are the last positions of the keys.

    With `surplus` padding keys in front, and as a `square` with padding queries.
    """
    from transformer_engine.pytorch import DotProductAttention

    groups, window_size = (HEADS, (window - 1, 0)) if window else (GROUPS, None)
    attention = DotProductAttention(
        HEADS,
        WIDTH,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attention_type="self" if window else "cross",
        window_size=window_size,
    )
    q, k, v = (x.requires_grad_() for x in tensors(queries, keys, groups))
    missing = keys + surplus - queries if square else 0
    mask = "causal" if square or queries == keys else "causal_bottom_right"
    do = torch.randn(queries, 1, HEADS * WIDTH, device="cuda", dtype=torch.bfloat16)

    def attend() -> Tensor:
        filled = [_fill(x, rows) for x, rows in ((q, missing), (k, surplus), (v, surplus))]
        return attention(*filled, attn_mask_type=mask)[-queries:]

    forward = do_bench(attend)
    # Its graph does not survive a backward: each time a fresh one.
    both = do_bench(lambda: torch.autograd.grad(attend(), (q, k, v), do))
    return forward, both - forward


def _fill(x: Tensor, rows: int) -> Tensor:
    """`rows` rows of zeros, then x [s, b, heads, D]."""
    return F.pad(x, (0, 0, 0, 0, 0, 0, rows, 0)) if rows else x


def torch_part(queries: int, keys: int, causal: bool) -> tuple[float, float]:
    """Milliseconds of forward, of backward of one part of the keys."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in tensors(queries, keys))
    o, lse, rng_state = partial.forward(q, k, v, causal, SCALE)
    forward = do_bench(lambda: partial.forward(q, k, v, causal, SCALE))
    return forward, do_bench(lambda: partial.backward(o, q, k, v, o, lse, rng_state, causal, SCALE))


class Table:
    """A line for each way to compute, the first being the whole sequence on one GPU; rows for results.jsonl."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokens, self.window, self.output = options.tokens, options.window, options.output
        self.device, self.alone = torch.cuda.get_device_name(), 0.0
        print(f"{self.device}, {self.tokens} tokens{f', window {self.window}' if self.window else ''}")
        print(f"{'':<52} {'fwd ms':>8} {'bwd ms':>8} {'layer':>8} TFLOP/s")

    def add(self, name: str, times: list[tuple[float, float]]) -> None:
        """`times`: (forward, backward) of each call that a rank needs."""
        pairs = self.tokens * (self.window or self.tokens / 2) / (2 if self.alone else 1)
        forward, backward = (sum(column) for column in zip(*times))
        total, flops = 2 * forward + backward, 4 * pairs * HEADS * WIDTH * (2 + 2.5)
        print(f"{name:<52} {forward:8.2f} {backward:8.2f} {total:8.2f} {flops / total / 1e9:8.0f}", flush=True)
        case = f"{self.tokens} tokens{f', window {self.window}' if self.window else ''}, {name}"
        values = dict(metric="attention of a layer", unit="ms", value=round(total, 2), higher_is_better=False)
        if self.alone:
            values |= dict(peer="half of one GPU's", peer_value=round(self.alone / 2, 2))
        else:
            self.alone = total
        record(self.output, benchmark="chunk_attention", case=case, device=self.device, **values)


def windows(tokens: int, window: int, table: Table) -> None:
    """A rank's two chunks inside the sequence, each with the keys before it that its window reaches."""
    chunk, keys = tokens // 4, tokens // 4 + window - 1
    table.add("one GPU", [transformer_engine(tokens, tokens, window)])
    for surplus, square in ((0, False), (1, False), (0, True), (1, True)):
        name = f"{'a square' if square else 'a call'} for each chunk, {keys + surplus} keys"
        table.add(name, 2 * [transformer_engine(chunk, keys, window, surplus, square)])


def cross(tokens: int, table: Table) -> None:
    """Attention over the shared keys and values."""
    chunk = tokens // 4
    table.add("one GPU, Transformer Engine", [transformer_engine(tokens, tokens)])
    for rank in (0, 1):
        ends = [(index + 1) * chunk for index in (rank, 3 - rank)]
        table.add(f"rank {rank}, a call for each chunk", [transformer_engine(chunk, end) for end in ends])
        other = (chunk, 2 * chunk) if rank == 0 else (2 * chunk, chunk)
        parts = [torch_part(2 * chunk, 2 * chunk, True), torch_part(*other, False)]
        table.add(f"rank {rank}, square and rectangle, not yet joined", parts)
    q = tensors(2 * chunk, 1)[0].permute(1, 2, 0, 3)
    lse = torch.randn(q.shape[:3], device="cuda")
    print(f"{'to merge all rows of a rank':<52} {do_bench(lambda: partial.merge_(q, lse, q, lse)):8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, help="of a self-decoder layer, instead of the shared keys and values")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results.jsonl")
    options = parser.parse_args()
    if not runtime.has_gpu():
        parser.error("this benchmark needs a GPU")
    table = Table(options)
    if options.window:
        windows(options.tokens, options.window, table)
    else:
        cross(options.tokens, table)


if __name__ == "__main__":
    main()
