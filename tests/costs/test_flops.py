"""The FLOP formulas against PyTorch's own counter on plain-torch computations, and against known totals."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from yoco_megatron.costs.flops import forward_flops_per_token, layer_flops_per_token, train_flops
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.mixers.gated_retention import RETENTION_CHUNK
from yoco_megatron.mixers.gated_retention import mixing_flops as retention_flops
from yoco_megatron.mixers.sliding_window import mean_visible_keys
from yoco_megatron.ops.gated_retention.torch import chunkwise

# Legend: N tokens, d hidden, F FFN width, h query heads of width D, g K,V heads, W window.
N, W = 128, 32
SMALL = ModelShape(
    architecture="yoco",
    self_decoder="gated_retention",
    num_layers=6,
    num_self_decoder_layers=2,
    hidden_size=96,
    ffn_hidden_size=160,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=24,
    self_decoder_heads=3,
    self_decoder_head_dim=24,  # together narrower than the hidden state
    self_decoder_query_groups=3,
    self_decoder_window=W,
    padded_vocab_size=320,
    seq_length=N,
    tied=False,
)
SMALL_WINDOW = replace(SMALL, self_decoder="sliding_window", self_decoder_query_groups=1)
SMALL_TRANSFORMER = replace(SMALL, architecture="transformer", num_self_decoder_layers=0)


def counted(function, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def linear(x_ND: torch.Tensor, width: int) -> torch.Tensor:
    return x_ND @ torch.randn(x_ND.shape[-1], width, requires_grad=True)


def ffn(x_ND: torch.Tensor, F: int) -> torch.Tensor:
    return linear(torch.nn.functional.silu(linear(x_ND, F)) * linear(x_ND, F), x_ND.shape[-1])


def dense_attention(x_ND, keys_ND, heads: int, D: int, groups: int) -> torch.Tensor:
    """Attention over all N x N pairs, mask left out: N / mean_visible_keys times what the model needs."""
    q, k, v = linear(x_ND, heads * D), linear(keys_ND, groups * D), linear(keys_ND, groups * D)
    return linear(attend(q, k, v, heads, D, groups), x_ND.shape[-1])


def attend(q, k, v, heads: int, D: int, groups: int) -> torch.Tensor:
    q_HND = q.unflatten(-1, (heads, D)).transpose(0, 1)
    k_HND, v_HND = (
        x.unflatten(-1, (groups, D)).transpose(0, 1).repeat_interleave(heads // groups, dim=0) for x in (k, v)
    )
    return ((q_HND @ k_HND.transpose(1, 2)).softmax(-1) @ v_HND).transpose(0, 1).flatten(1)


def retention(x_ND: torch.Tensor, heads: int, D: int) -> torch.Tensor:
    q, k, v = (linear(x_ND, heads * D).unflatten(-1, (heads, -1))[None] for _ in range(3))
    log_decay = -linear(x_ND, heads).abs()[None]
    o, _ = chunkwise(q, k, v, log_decay, chunk_size=RETENTION_CHUNK)
    return linear(torch.nn.functional.silu(linear(x_ND, heads * D)) * o[0].flatten(1), x_ND.shape[-1])


def whole_model(shape: ModelShape, x_ND: torch.Tensor) -> torch.Tensor:
    """The matrix products of a model, in order: no norms, no RoPE, no masks; attention is dense."""
    heads, D, groups = shape.num_attention_heads, shape.kv_channels, shape.num_query_groups
    F = shape.ffn_hidden_size
    if shape.architecture == "transformer":
        for _ in range(shape.num_layers):
            x_ND = x_ND + dense_attention(x_ND, x_ND, heads, D, groups)
            x_ND = x_ND + ffn(x_ND, F)
        return linear(x_ND, shape.padded_vocab_size)
    for _ in range(shape.num_self_decoder_layers):
        if shape.self_decoder == "gated_retention":
            x_ND = x_ND + retention(x_ND, shape.self_decoder_heads, shape.self_decoder_head_dim)
        else:
            x_ND = x_ND + dense_attention(
                x_ND,
                x_ND,
                shape.self_decoder_heads,
                shape.self_decoder_head_dim,
                shape.self_decoder_query_groups,
            )
        x_ND = x_ND + ffn(x_ND, F)
    k, v = linear(x_ND, groups * D), linear(x_ND, groups * D)
    for _ in range(shape.num_cross_decoder_layers):
        q = linear(x_ND, heads * D)
        x_ND = x_ND + linear(attend(q, k, v, heads, D, groups), x_ND.shape[-1])
        x_ND = x_ND + ffn(x_ND, F)
    return linear(x_ND, shape.padded_vocab_size)


def with_dense_attention(shape: ModelShape) -> float:
    """The formula's forward FLOPs per token, with the masked pairs put back that dense attention computes."""
    flops = dict(forward_flops_per_token(shape))
    causal = N / mean_visible_keys(N)
    for part, factor in {
        "decoder_mixing": causal,
        "cross_decoder_mixing": causal,
        "self_decoder_mixing": N / mean_visible_keys(N, W) if shape.self_decoder == "sliding_window" else 1,
    }.items():
        if part in flops:
            flops[part] *= factor
    return sum(flops.values())


@pytest.mark.parametrize("shape", [SMALL, SMALL_WINDOW, SMALL_TRANSFORMER], ids=["retention", "window", "transformer"])
def test_whole_model_forward_and_backward(shape):
    x_ND = torch.randn(N, shape.hidden_size, requires_grad=True)  # an embedding: its gradient is needed as well
    forward = counted(lambda x: whole_model(shape, x), x_ND)
    assert forward == pytest.approx(N * with_dense_attention(shape), rel=1e-12)
    both = counted(lambda x: whole_model(shape, x).sum().backward(), x_ND)
    assert both == 3 * forward


@pytest.mark.parametrize("window", [None, 1, W, N, 5 * N])
def test_visible_keys_are_those_of_the_mask(window):
    row, column = torch.arange(N)[:, None], torch.arange(N)[None, :]
    mask = (column <= row) & (row - column < (window or N))
    assert mean_visible_keys(N, window) == mask.sum().item() / N


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("chunk_factor", [1, 2])
def test_retention_counts_chunkwise_at_chunk_64(heads, chunk_factor):
    shape = replace(SMALL, self_decoder_heads=heads, self_decoder_query_groups=heads)
    D, C = shape.self_decoder_head_dim, RETENTION_CHUNK * chunk_factor
    q, k, v = torch.randn(3, 1, 4 * RETENTION_CHUNK, heads, D).unbind(0)
    log_decay = -torch.rand(q.shape[:3])
    per_token = counted(lambda: chunkwise(q, k, v, log_decay, chunk_size=C)) / q.shape[1]
    # Larger chunks make an implementation work more inside them; the model's FLOPs stay those of chunk 64.
    larger_chunks = heads * 4 * (C - RETENTION_CHUNK) * D
    assert per_token == retention_flops(shape) + larger_chunks


def test_retention_pads_to_whole_chunks_without_changing_the_models_count():
    T, D = 100, SMALL.self_decoder_head_dim
    q, k, v = torch.randn(3, 1, T, SMALL.self_decoder_heads, D).unbind(0)
    measured = counted(lambda: chunkwise(q, k, v, -torch.rand(q.shape[:3]), chunk_size=RETENTION_CHUNK))
    assert measured == 128 * retention_flops(SMALL)


def test_layers_and_totals_agree():
    layer = layer_flops_per_token(SMALL)
    total = forward_flops_per_token(SMALL)
    assert total["self_decoder_linear"] == 2 * layer["self_decoder"]["linear"]
    assert total["cross_decoder_mixing"] == 4 * layer["cross_decoder"]["mixing"]
    assert total["shared_kv"] == 2 * 2 * 96 * 2 * 24
    assert train_flops(SMALL, 5) == 3 * 5 * N * sum(total.values())


def test_tying_saves_parameters_but_no_flops():
    assert forward_flops_per_token(replace(SMALL, tied=True)) == forward_flops_per_token(SMALL)


# Hidden, layers, FFN, heads, K,V heads; sequence length; GFLOP per token of training of YOCO and of its dense
# twin with the same sizes; vocabulary 100,352. Derived independently of this code, met to the printed digit.
TRAINING_GFLOP = [
    ((2048, 24, 5632, 16, 4), 4096, 9.0, 8.9),
    ((2048, 24, 5632, 16, 4), 32768, 13.2, 17.4),
    ((2048, 24, 5632, 16, 4), 131072, 27.7, 46.4),
    ((3072, 26, 8192, 24, 8), 4096, 19.9, 19.5),
    ((3072, 26, 8192, 24, 8), 8192, 20.9, 21.5),
    ((3072, 26, 8192, 24, 8), 32768, 26.8, 33.3),
    ((3072, 26, 8192, 24, 8), 131072, 50.3, 80.4),
    ((3072, 26, 8192, 24, 8), 1048576, 270, 520),
    ((4096, 32, 14336, 32, 8), 4096, 49.4, 47.6),
    ((4096, 32, 14336, 32, 8), 131072, 99.3, 147.4),
]


@pytest.mark.parametrize(("sizes", "seq_length", "yoco", "transformer"), TRAINING_GFLOP)
def test_training_gflop_per_token(sizes, seq_length, yoco, transformer):
    d, layers, F, heads, groups = sizes
    shape = ModelShape(
        architecture="yoco",
        self_decoder="gated_retention",
        num_layers=layers,
        num_self_decoder_layers=layers // 2,
        hidden_size=d,
        ffn_hidden_size=F,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=d // heads,
        self_decoder_heads=heads,
        self_decoder_head_dim=d // heads,
        self_decoder_query_groups=heads,
        self_decoder_window=1024,
        padded_vocab_size=100_352,
        seq_length=seq_length,
        tied=False,
    )
    twin = replace(shape, architecture="transformer", num_self_decoder_layers=0)
    for model, want in ((shape, yoco), (twin, transformer)):
        per_token = train_flops(model, batch_size=1) / seq_length / 1e9
        assert per_token == pytest.approx(want, abs=0.051 if want < 200 else 0.51)


def test_a_loss_on_the_last_positions() -> None:
    """Cross-decoder and head at M of N positions: position i sees i + 1 keys; self-decoder and K,V are as before."""
    queries = 5
    some, every = (forward_flops_per_token(replace(SMALL, num_queries=number)) for number in (queries, None))
    behind = {"cross_decoder_linear", "cross_decoder_mixing", "output_layer"}
    assert {part for part in every if some[part] != every[part]} == behind
    for part in ("cross_decoder_linear", "output_layer"):
        assert some[part] == pytest.approx(every[part] * queries / N)
    keys = sum(position + 1 for position in range(N - queries, N)) / sum(range(1, N + 1))
    assert some["cross_decoder_mixing"] == pytest.approx(every["cross_decoder_mixing"] * keys)
