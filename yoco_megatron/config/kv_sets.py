"""Where the shared K,V come from (--shared-kv-sources), and which layers read which of them (--shared-kv-sets)."""

from collections.abc import Sequence
from typing import Any

from yoco_megatron.config.memory_units import ATTENTION


def sources_of(config: Any) -> tuple[int, ...]:
    """Of each projection to shared K,V the layers before it: the self-decoder's last one, unless the flags say others.
    Each makes as many sets, those of the first source first.

    Args:
        config: a YOCOConfig, a ModelShape, or the flags, with the number of the self-decoder's layers resolved.
    """
    return tuple(getattr(config, "shared_kv_sources", None) or (config.num_self_decoder_layers,))


def source_name(source: int, sources: Sequence[int]) -> str:
    """Of the module that projects there: that of the last source has the name of an only one."""
    return "shared_kv" if source == sources[-1] else f"shared_kv_{source}"


def layers_of_sets(
    num_layers: int, split_layer: int, kv_sets: int, mtp_layers: int = 0, pattern: str | None = None
) -> list[range]:
    """For each set of K,V the layers that read it, counted from 0: equal groups of neighbours.

    Args:
        split_layer: the first of the cross-decoder.
        mtp_layers: of multi-token prediction, which come after all others and read the last set.
        pattern: --cross-decoder-pattern, if there is one: each group then reaches from its first layer that attends
            to its last.
    """
    size = (num_layers - split_layer) // kv_sets
    groups = [range(first, first + size) for first in range(split_layer, num_layers, size)]
    if pattern:
        attend = [[index for index in group if pattern[index - split_layer] == ATTENTION] for group in groups]
        groups = [range(layers[0], layers[-1] + 1) for layers in attend]
    if mtp_layers:
        groups[-1] = range(groups[-1].start, num_layers + mtp_layers)
    return groups


def source_stages(cuts: Sequence[int], sources: Sequence[int]) -> list[int]:
    """The stage that makes the K,V of each source: the one that holds the layer before it (with none, the first).

    Args:
        cuts: stage g holds layers [cuts[g], cuts[g + 1]).
    """
    return [next(g for g, last in enumerate(cuts[1:]) if last >= source) for source in sources]


def sets_arriving(cuts: Sequence[int], sources: Sequence[int], layers_of_sets: Sequence[range], g: int) -> range:
    """The sets of K,V in the tensor that enters stage g: those made before it that a layer from g on reads."""
    if not 0 < g < len(cuts) - 1:
        return range(0)
    made = sum(stage < g for stage in source_stages(cuts, sources)) * len(layers_of_sets) // len(sources)
    return range(min(made, sum(layers.stop <= cuts[g] for layers in layers_of_sets)), made)
