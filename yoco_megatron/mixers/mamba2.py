"""Mamba-2 (arXiv 2405.21060): retention whose decay and step come from each token, behind a short convolution.

d hidden, H heads of width P in G groups, N values of state for each value of a head; W the convolution's kernel.
FLOPs of the recurrence are counted as those of gated retention, with N for the width of keys and P for that of values.
"""

from yoco_megatron.mixers.gated_retention import RETENTION_CHUNK
from yoco_megatron.mixers.record import FusedMatrix, Mixer, Shape, Sizes
from yoco_megatron.utils.errors import require

WIDTH = 4
"""Of the convolution's kernel."""


def default_heads(hidden_size: int, head_dim: int) -> int:
    """Heads that are together twice as wide as the hidden states, as in the paper. Raises ValueError if none are."""
    require(
        head_dim >= 1 and 2 * hidden_size % head_dim == 0,
        f"--mamba-head-dim {head_dim} does not divide twice --hidden-size {hidden_size}: change one, or set "
        "--mamba-num-heads",
    )
    return 2 * hidden_size // head_dim


def check(sizes: Sizes) -> None:
    """Raises ValueError for sizes below 1, or groups that do not divide the heads."""
    for name in ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"):
        value = getattr(sizes, name)
        require(value is not None and value >= 1, f"--{name.replace('_', '-')} {value} must be at least 1")
    heads, groups = _heads(sizes), sizes.mamba_num_groups
    require(
        heads % groups == 0,
        f"--mamba-num-heads {heads} is not a multiple of --mamba-num-groups {groups}: change one, each group's B and C "
        "serve as many heads",
    )


def _heads(sizes: Sizes) -> int:
    assert sizes.mamba_num_heads is not None  # config.resolve
    return sizes.mamba_num_heads


def _width(sizes: Sizes) -> int:
    """H P: values of a token's x, and of its gate z."""
    return _heads(sizes) * sizes.mamba_head_dim


def _keys(sizes: Sizes) -> int:
    """G N: values of a token's B, and of its C."""
    return sizes.mamba_num_groups * sizes.mamba_state_dim


def _channels(sizes: Sizes) -> int:
    """Of the convolution: x, B and C."""
    return _width(sizes) + 2 * _keys(sizes)


def matmul_parameters(sizes: Sizes) -> int:
    """z, x, B, C and output, and one step a head."""
    return sizes.hidden_size * (2 * _width(sizes) + _channels(sizes) + _heads(sizes))


def mixing_flops(sizes: Sizes) -> float:
    """H (2 C (N + P) + 4 N P) in chunks of C tokens, and 2 W a channel of the convolution."""
    N, P = sizes.mamba_state_dim, sizes.mamba_head_dim
    return _heads(sizes) * (2 * RETENTION_CHUNK * (N + P) + 4 * N * P) + 2 * WIDTH * _channels(sizes)


def stored_bytes(sizes: Sizes, bytes_per_value: int) -> float:
    """The projection, the convolution's input and output, dt x, the recurrence's output, the normalised and gated one;
    an N x P state a head every 512 tokens; fp32 steps and decays."""
    values = 4 * _width(sizes) + 3 * _channels(sizes)
    return (values + _state(sizes) / 512) * bytes_per_value + 16 * _heads(sizes)


def _state(sizes: Sizes) -> int:
    return _width(sizes) * sizes.mamba_state_dim


def received_bytes(sizes: Sizes, ranks: int, sequences: int, bytes_per_value: int, forward_passes: int) -> float:
    """States and decays of every other rank's two chunks forward, states alone backward, all in fp32; and the W - 1
    tokens before each of two chunks forward, their gradients backward."""
    states = (ranks - 1) * 2 * sequences * 4 * (forward_passes * (_state(sizes) + _heads(sizes)) + _state(sizes))
    halos = 2 * (ranks - 1) / ranks * (WIDTH - 1) * sequences * _channels(sizes) * bytes_per_value
    return states + halos * (forward_passes + 1)


def tensors(sizes: Sizes) -> dict[str, Shape]:
    """z, x, B, C, output; the steps."""
    h, width, keys = sizes.hidden_size, _width(sizes), _keys(sizes)
    found: dict[str, Shape] = {"z_proj": (width, h), "x_proj": (width, h), "B_proj": (keys, h), "C_proj": (keys, h)}
    return found | {"o_proj": (h, width), "dt_proj": (_heads(sizes), h)}


def vectors(sizes: Sizes) -> dict[str, Shape]:
    """The convolution of x, B and C; decay, bias of the step and skip of each head; the norm."""
    heads, width, keys = _heads(sizes), _width(sizes), _keys(sizes)
    found: dict[str, Shape] = {}
    for name, channels in (("x_conv", width), ("B_conv", keys), ("C_conv", keys)):
        found |= {f"{name}.weight": (channels, 1, WIDTH), f"{name}.bias": (channels,)}
    return found | {"A_log": (heads,), "dt_bias": (heads,), "D": (heads,), "norm.weight": (width,)}


def fused(sizes: Sizes) -> list[FusedMatrix]:
    """Matrices, and convolutions, in one, by group; the steps by themselves."""
    groups, keys = sizes.mamba_num_groups, sizes.mamba_state_dim
    width = _width(sizes) // groups
    return [
        FusedMatrix("linear_zxBC", ("z_proj", "x_proj", "B_proj", "C_proj"), groups, (width, width, keys, keys)),
        FusedMatrix("conv", ("x_conv", "B_conv", "C_conv"), groups, (width, keys, keys)),
        FusedMatrix("linear_dt", ("dt_proj",), is_logits=True),
    ]


def cache_bytes(sizes: Sizes, bytes_per_value: int) -> int:
    """One N x P state a head, in fp32, and the convolution's last W - 1 inputs."""
    return 4 * _state(sizes) + (WIDTH - 1) * _channels(sizes) * bytes_per_value


MAMBA2 = Mixer(
    name="mamba2",
    letter="M",
    options=(
        "mamba_num_heads",
        "mamba_head_dim",
        "mamba_state_dim",
        "mamba_num_groups",
        "retention_backend",
        "retention_chunk_size",
    ),
    check=check,
    divided=lambda sizes: {"--mamba-num-groups": sizes.mamba_num_groups},
    layer_spec="yoco_megatron.model.self_decoder.mamba2:layer_spec",
    init_law="yoco_megatron.model.self_decoder.mamba2:init_law",
    init_name="mamba2",
    is_softmax_attention=False,
    separates_documents=True,
    matmul_parameters=matmul_parameters,
    mixing_flops=mixing_flops,
    flop_rate=lambda backend: 12e12 if backend == "torch" else 100e12,  # as gated retention; not measured alone
    stored_bytes=stored_bytes,
    recomputed_values=lambda sizes: _width(sizes),  # the normalised and gated output
    received_bytes=received_bytes,
    memory_width=_width,
    tensors=tensors,
    vectors=vectors,
    fused=fused,
    fused_norm=None,
    hf_layer_type="linear_attention",
    fla_type=None,
    cache_bytes=cache_bytes,
    cache="recurrent state",
    description=lambda sizes: f"Mamba-2, {_heads(sizes)} heads of width {sizes.mamba_head_dim}",
)
