"""Sliding-window attention (paper section 2.1): each query attends to the last W keys of its document.

d hidden, H query heads and G K,V heads of width D; H D need not be d.
"""

from yoco_megatron.mixers.record import FusedMatrix, Mixer, Shape, Sizes


def mean_visible_keys(seq_length: int, window: int | None = None) -> float:
    """Keys that a causal query attends to, itself included, averaged over a sequence; at most `window` of them."""
    full = min(seq_length, window or seq_length)
    return (full * (full + 1) / 2 + (seq_length - full) * full) / seq_length


def _queries(sizes: Sizes) -> int:
    """H D: values of a token's queries."""
    return sizes.self_decoder_heads * sizes.self_decoder_head_dim


def _keys(sizes: Sizes) -> int:
    """G D: values of a token's keys, or of its values."""
    return sizes.self_decoder_query_groups * sizes.self_decoder_head_dim


def matmul_parameters(sizes: Sizes) -> int:
    """Queries and output, d H D each; keys and values, d G D each."""
    return 2 * sizes.hidden_size * (_queries(sizes) + _keys(sizes))


def mixing_flops(sizes: Sizes) -> float:
    """4 H D mean_i min(i + 1, W): exact, the short start included."""
    return 4 * _queries(sizes) * mean_visible_keys(sizes.seq_length, sizes.self_decoder_window)


def stored_bytes(sizes: Sizes, bytes_per_value: int) -> float:
    """q, k, v, output; the fp32 logarithm of the softmax's sum."""
    return 2 * (_queries(sizes) + _keys(sizes)) * bytes_per_value + 4 * sizes.self_decoder_heads


def received_bytes(sizes: Sizes, ranks: int, sequences: int, bytes_per_value: int, forward_passes: int) -> float:
    """The W - 1 keys and values before each of two chunks forward, their gradients backward (W - 1 <= s / 2 ranks)."""
    row = sequences * 2 * _keys(sizes) * bytes_per_value
    return 2 * (ranks - 1) / ranks * (sizes.self_decoder_window - 1) * row * (forward_passes + 1)


def tensors(sizes: Sizes) -> dict[str, Shape]:
    """q, k, v, output."""
    h, q, kv = sizes.hidden_size, _queries(sizes), _keys(sizes)
    return {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}


def fused(sizes: Sizes) -> list[FusedMatrix]:
    """Three matrices in one: a group is a K,V head with its queries, as in Megatron's SelfAttention."""
    groups = sizes.self_decoder_query_groups
    qkv = ("q_proj", "k_proj", "v_proj")
    return [FusedMatrix("linear_qkv", qkv, groups, (sizes.self_decoder_heads // groups, 1, 1))]


def cache_bytes(sizes: Sizes, bytes_per_value: int) -> int:
    """Keys and values of W - 1 tokens."""
    return (sizes.self_decoder_window - 1) * 2 * _keys(sizes) * bytes_per_value


SLIDING_WINDOW = Mixer(
    name="sliding_window",
    letter="S",
    options=("self_decoder_window", "self_decoder_query_groups"),
    check=lambda sizes: None,
    divided=lambda sizes: {
        "--self-decoder-heads": sizes.self_decoder_heads,
        "--self-decoder-query-groups": sizes.self_decoder_query_groups,
    },
    layer_spec="yoco_megatron.model.self_decoder.sliding_window:layer_spec",
    init_law="yoco_megatron.model.init:default_law",
    init_name="self_attention",
    is_softmax_attention=True,
    separates_documents=True,
    matmul_parameters=matmul_parameters,
    mixing_flops=mixing_flops,
    flop_rate=lambda backend: 400e12,  # as cross attention at 4096 tokens; not measured alone
    stored_bytes=stored_bytes,
    recomputed_values=lambda sizes: 0,
    received_bytes=received_bytes,
    memory_width=lambda sizes: 0,
    tensors=tensors,
    vectors=lambda sizes: {},
    fused=fused,
    fused_norm="linear_qkv",
    hf_layer_type="sliding_attention",
    fla_type="swa",
    cache_bytes=cache_bytes,
    cache="windows",
    description=lambda sizes: f"sliding window of {sizes.self_decoder_window}",
)
