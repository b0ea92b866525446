"""The feed-forward of a layer, in chunks of the sequence where it is long.

The widest activations of a layer are here: 2 x ffn-hidden-size values a token, and again as gradients. With
`--mlp-chunks-for-training N` Megatron's TransformerLayer calls the MLP for one chunk after the other, which alone saves
nothing, since backward needs all of them. Here each chunk is computed again in backward, so that only one is wide at
a time: 1M tokens on two GPUs need that.
"""

from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class ChunkedMLP(MLP):
    """Megatron's MLP, recomputed in backward where the layer calls it in chunks."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> ([s, b, h], no bias)."""
        run = partial(super().forward, **kwargs)
        if self.config.mlp_chunks_for_training == 1 or not self.training:
            return run(hidden_states)
        return tensor_parallel.checkpoint(run, False, hidden_states)
