"""Short causal convolution of each channel by itself, with SiLU, as in Mamba-2 and gated DeltaNet.

y_t = silu(bias + sum_{j<W} w[W - 1 - j] x_{t-j})
"""

from yoco_megatron.ops.short_convolution.torch import short_convolution

__all__ = ["short_convolution"]
