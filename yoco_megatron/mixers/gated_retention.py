"""Gated retention (paper section 3): the recurrence S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t.

d hidden, H heads of width D; H D need not be d.

Retention has no single natural count of FLOPs. The recurrence needs 4 D^2 a head but leaves matrix units idle; chunks
of C tokens put them to work for 4 C D more: q k^T and its product with v cost 2 C D each, k^T v into the state and q
times the state 2 D^2 each. C = 64 is fixed here, so that neither --retention-chunk-size nor a kernel's tiling changes
the MFU of a run, and the C x C products count in full, as usual for linear attention (their lower triangle alone would
take 0.08% off a step of the 3B model at 4K tokens).
"""

from yoco_megatron.mixers.record import FusedMatrix, Mixer, Shape, Sizes

RETENTION_CHUNK = 64


def _width(sizes: Sizes) -> int:
    """H D: values of a token's queries, and of its keys, values and gate."""
    return sizes.self_decoder_heads * sizes.self_decoder_head_dim


def matmul_parameters(sizes: Sizes) -> int:
    """q, k, v, gate and output, d H D each, and one decay logit a head."""
    return sizes.hidden_size * (5 * _width(sizes) + sizes.self_decoder_heads)


def mixing_flops(sizes: Sizes) -> float:
    """H (4 C D + 4 D^2), see the module."""
    D = sizes.self_decoder_head_dim
    return sizes.self_decoder_heads * (4 * RETENTION_CHUNK * D + 4 * D * D)


def flop_rate(backend: str) -> float:
    """Measured with the 3B in training on one H200, bf16 (benchmarks/NOTES.md)."""
    return 12e12 if backend == "torch" else 100e12


def stored_bytes(sizes: Sizes, bytes_per_value: int) -> float:
    """q, k, v, gate, output, the normalised and gated output; a D x D state a head every 512 tokens; fp32 decays."""
    values = _width(sizes) * (6 + sizes.self_decoder_head_dim / 512)
    return values * bytes_per_value + 8 * sizes.self_decoder_heads


def received_bytes(sizes: Sizes, ranks: int, sequences: int, bytes_per_value: int, forward_passes: int) -> float:
    """States and decays of every other rank's two chunks forward, states alone backward, all in fp32."""
    state = (ranks - 1) * 2 * sequences * sizes.self_decoder_heads * 4
    return state * (forward_passes * (sizes.self_decoder_head_dim**2 + 1) + sizes.self_decoder_head_dim**2)


def tensors(sizes: Sizes) -> dict[str, Shape]:
    """q, k, v, gate, output; the decay's logits."""
    h, width = sizes.hidden_size, _width(sizes)
    found: dict[str, Shape] = dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj"), (width, h))
    return found | {"o_proj": (h, width), "decay_proj": (sizes.self_decoder_heads, h)}


def fused(sizes: Sizes) -> list[FusedMatrix]:
    """Four matrices in one, by head; the decay by itself."""
    qkvg = ("q_proj", "k_proj", "v_proj", "g_proj")
    return [
        FusedMatrix("linear_qkvg", qkvg, sizes.self_decoder_heads, (1, 1, 1, 1)),
        FusedMatrix("linear_decay", ("decay_proj",), is_logits=True),
    ]


def cache_bytes(sizes: Sizes, bytes_per_value: int) -> int:
    """One D x D state a head, in fp32."""
    return _width(sizes) * sizes.self_decoder_head_dim * 4


GATED_RETENTION = Mixer(
    name="gated_retention",
    letter="R",
    options=("decay_temperature", "retention_backend", "retention_chunk_size"),
    check=lambda sizes: None,
    divided=lambda sizes: {"--self-decoder-heads": sizes.self_decoder_heads},
    layer_spec="yoco_megatron.model.self_decoder.gated_retention:layer_spec",
    init_law="yoco_megatron.model.self_decoder.gated_retention:init_law",
    init_name="retention",
    is_softmax_attention=False,
    separates_documents=True,
    matmul_parameters=matmul_parameters,
    mixing_flops=mixing_flops,
    flop_rate=flop_rate,
    stored_bytes=stored_bytes,
    recomputed_values=lambda sizes: _width(sizes),  # the normalised and gated output
    received_bytes=received_bytes,
    memory_width=_width,
    tensors=tensors,
    vectors=lambda sizes: {},
    fused=fused,
    fused_norm=None,
    hf_layer_type="linear_attention",
    fla_type="gated_retention",
    cache_bytes=cache_bytes,
    cache="recurrent state",
    description=lambda sizes: "gated retention",
)
