"""Gated memory units (--cross-decoder-pattern; SambaY, arXiv 2507.06607): cross-decoder layers that attend to nothing,
but gate the memory, the readout of one layer of the self-decoder: y = (m * silu(x W1)) W2."""

from typing import Any

from yoco_megatron.mixers import mixer_of_layer
from yoco_megatron.utils.errors import require

ATTENTION, UNIT = "A", "G"


def is_memory_unit(config: Any, index: int) -> bool:
    """Whether layer `index` of the whole model is one.

    Args:
        config: a YOCOConfig, a ModelShape, or the flags, with the number of the self-decoder's layers resolved.
    """
    pattern, place = getattr(config, "cross_decoder_pattern", None) or "", index - config.num_self_decoder_layers
    return 0 <= place < len(pattern) and pattern[place] == UNIT


def attention_layers(config: Any) -> int:
    """Layers of the cross-decoder that attend to the shared K,V."""
    return config.num_cross_decoder_layers - (getattr(config, "cross_decoder_pattern", None) or "").count(UNIT)


def memory_source(config: Any) -> int | None:
    """The layer, counted from 0, that makes the memory: the last of the self-decoder whose mixer has one, as in the
    paper. None if there are no units."""
    if not getattr(config, "cross_decoder_pattern", None):
        return None
    for index in reversed(range(config.num_self_decoder_layers)):
        if mixer_of_layer(config.self_decoder, index).memory_width(config):
            return index
    raise ValueError(
        f"--cross-decoder-pattern {config.cross_decoder_pattern} has gated memory units (G), and no layer of "
        f"--self-decoder {config.self_decoder} has a memory that they could read: use a recurrent mixer in one"
    )


def memory_width(config: Any) -> int:
    """Values of a token's memory, of all tensor-parallel ranks; 0 if there are no units."""
    source = memory_source(config)
    return 0 if source is None else mixer_of_layer(config.self_decoder, source).memory_width(config)


def memory_cuts(config: Any) -> range:
    """Cuts between layers that the memory crosses: those behind its source, up to the last unit."""
    source = memory_source(config)
    if source is None:
        return range(0)
    return range(source + 1, config.num_self_decoder_layers + config.cross_decoder_pattern.rindex(UNIT) + 1)


def check_pattern(config: Any) -> None:
    """Raises ValueError for a --cross-decoder-pattern that does not fit, naming it."""
    pattern, layers = getattr(config, "cross_decoder_pattern", None), config.num_layers - config.num_self_decoder_layers
    if pattern is None:
        return
    told = f"--cross-decoder-pattern {pattern}"
    require(
        bool(pattern) and set(pattern) <= {ATTENTION, UNIT},
        f"{told} must have the letters {ATTENTION} (attention to the shared K,V) and {UNIT} (a gated memory unit)",
    )
    require(
        len(pattern) == layers,
        f"{told} has {len(pattern)} letters, and the cross-decoder {layers} layers: write one letter for each, or "
        "change --num-self-decoder-layers",
    )
    size = layers // config.shared_kv_sets
    require(
        all(ATTENTION in pattern[first : first + size] for first in range(0, layers, size)),
        f"{told}: of each {size} neighbouring layers, which share K,V, one at least must attend to them ({ATTENTION})",
    )
    memory_source(config)
