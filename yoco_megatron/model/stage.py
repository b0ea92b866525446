"""`Stage`: the part of a model that one pipeline stage holds. A model that is not cut is one stage."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Layers [first, last) of the model, counted from 0, and what stands before and after them.

    pre_process: holds the embedding; post_process: holds the head.
    makes_kv: projects the shared K,V; kv_in: they arrive with the hidden states; kv_out: they leave with them.
    """

    first: int
    last: int
    pre_process: bool = True
    post_process: bool = True
    makes_kv: bool = True
    kv_in: bool = False
    kv_out: bool = False

    def split(self, border: int) -> tuple[int, int]:
        """(self-decoder layers, cross-decoder layers) held here; layer `border` is the first of the cross-decoder."""
        n_self = max(0, min(self.last, border) - self.first)
        return n_self, self.last - self.first - n_self
