"""Which layers read which of the shared K,V (--shared-kv-sets)."""


def layers_of_sets(num_layers: int, split_layer: int, kv_sets: int) -> list[range]:
    """For each set of K,V the layers that read it, counted from 0: equal groups of neighbours.

    Args:
        split_layer: the first of the cross-decoder.
    """
    size = (num_layers - split_layer) // kv_sets
    return [range(first, first + size) for first in range(split_layer, num_layers, size)]
