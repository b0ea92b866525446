"""Gated DeltaNet (arXiv 2412.06464): a state that replaces what a key held, behind a short convolution.

d hidden, H heads of width D; H D need not be d. W is the width of the convolution's kernel.

FLOPs of the recurrence are counted in chunks of C = 64 tokens, as those of gated retention and 4 C D + 2 D^2 a head
more for what replaces the values: k k^T (2 C D), a triangular system with two right sides of width D (C D each), and
what the state holds under these keys (2 D^2).
"""

from yoco_megatron.mixers.gated_retention import RETENTION_CHUNK
from yoco_megatron.mixers.mamba2 import WIDTH
from yoco_megatron.mixers.record import FusedMatrix, Mixer, Shape, Sizes


def _width(sizes: Sizes) -> int:
    """H D: values of a token's queries, and of its keys, values and gate."""
    return sizes.self_decoder_heads * sizes.self_decoder_head_dim


def _state(sizes: Sizes) -> int:
    """H D^2."""
    return _width(sizes) * sizes.self_decoder_head_dim


def matmul_parameters(sizes: Sizes) -> int:
    """q, k, v, gate and output, d H D each; beta and one decay logit a head."""
    return sizes.hidden_size * (5 * _width(sizes) + 2 * sizes.self_decoder_heads)


def mixing_flops(sizes: Sizes) -> float:
    """H (8 C D + 6 D^2), see the module, and 2 W a channel of the convolution."""
    return 8 * RETENTION_CHUNK * _width(sizes) + 6 * _state(sizes) + 6 * WIDTH * _width(sizes)


def stored_bytes(sizes: Sizes, bytes_per_value: int) -> float:
    """Inputs and outputs of the convolution, the gate; of flash-linear-attention's kernels q, k, v and C values a head,
    fp32 decays and betas; the output, the normalised and gated one."""
    values = 12 * _width(sizes) + RETENTION_CHUNK * sizes.self_decoder_heads
    return values * bytes_per_value + 16 * sizes.self_decoder_heads


def received_bytes(sizes: Sizes, ranks: int, sequences: int, bytes_per_value: int, forward_passes: int) -> float:
    """States and the matrices that they pass through, of every other rank's two chunks forward, states alone backward,
    all in fp32; and the W - 1 tokens before each of two chunks forward, their gradients backward."""
    states = (ranks - 1) * 2 * sequences * 4 * _state(sizes) * (2 * forward_passes + 1)
    halos = 2 * (ranks - 1) / ranks * (WIDTH - 1) * sequences * 3 * _width(sizes) * bytes_per_value
    return states + halos * (forward_passes + 1)


def tensors(sizes: Sizes) -> dict[str, Shape]:
    """q, k, v, gate, output; the logits of beta and of the decay."""
    h, heads, width = sizes.hidden_size, sizes.self_decoder_heads, _width(sizes)
    found: dict[str, Shape] = dict.fromkeys(("q_proj", "k_proj", "v_proj", "g_proj"), (width, h))
    return found | {"o_proj": (h, width), "b_proj": (heads, h), "a_proj": (heads, h)}


def vectors(sizes: Sizes) -> dict[str, Shape]:
    """The convolutions; decay and its bias of each head; the norm."""
    heads = sizes.self_decoder_heads
    found: dict[str, Shape] = {f"{name}_conv.weight": (_width(sizes), 1, WIDTH) for name in "qkv"}
    return found | {"A_log": (heads,), "dt_bias": (heads,), "norm.weight": (sizes.self_decoder_head_dim,)}


def fused(sizes: Sizes) -> list[FusedMatrix]:
    """Four matrices, three convolutions and two logits in one, by head."""
    heads = sizes.self_decoder_heads
    return [
        FusedMatrix("linear_qkvg", ("q_proj", "k_proj", "v_proj", "g_proj"), heads, (1, 1, 1, 1)),
        FusedMatrix("conv", ("q_conv", "k_conv", "v_conv"), heads, (1, 1, 1)),
        FusedMatrix("linear_ba", ("b_proj", "a_proj"), heads, (1, 1), is_logits=True),
    ]


def cache_bytes(sizes: Sizes, bytes_per_value: int) -> int:
    """One D x D state a head, in fp32, and the convolution's last inputs."""
    return 4 * _state(sizes) + (WIDTH - 1) * 3 * _width(sizes) * bytes_per_value


GATED_DELTA_NET = Mixer(
    name="gated_delta_net",
    letter="G",
    options=("gated_delta_backend",),
    check=lambda sizes: None,
    divided=lambda sizes: {"--self-decoder-heads": sizes.self_decoder_heads},
    layer_spec="yoco_megatron.model.self_decoder.gated_delta_net:layer_spec",
    init_law="yoco_megatron.model.self_decoder.gated_delta_net:init_law",
    init_name="gated_delta_net",
    is_softmax_attention=False,
    separates_documents=True,
    matmul_parameters=matmul_parameters,
    mixing_flops=mixing_flops,
    flop_rate=lambda backend: 100e12,  # as gated retention; not measured
    stored_bytes=stored_bytes,
    recomputed_values=lambda sizes: _width(sizes),  # the normalised and gated output
    received_bytes=received_bytes,
    memory_width=_width,
    tensors=tensors,
    vectors=vectors,
    fused=fused,
    fused_norm=None,
    hf_layer_type="linear_attention",
    fla_type="gated_deltanet",
    cache_bytes=cache_bytes,
    cache="recurrent state",
    description=lambda sizes: "gated DeltaNet",
)
