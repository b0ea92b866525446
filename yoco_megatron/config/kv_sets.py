"""Which layers read which of the shared K,V (--shared-kv-sets)."""


def layers_of_sets(num_layers: int, split_layer: int, kv_sets: int, mtp_layers: int = 0) -> list[range]:
    """For each set of K,V the layers that read it, counted from 0: equal groups of neighbours.

    Args:
        split_layer: the first of the cross-decoder.
        mtp_layers: of multi-token prediction, which come after all others and read the last set.
    """
    size = (num_layers - split_layer) // kv_sets
    groups = [range(first, first + size) for first in range(split_layer, num_layers, size)]
    groups[-1] = range(groups[-1].start, groups[-1].stop + mtp_layers)
    return groups
