"""Causal attention, full or windowed, grouped-query, of sequences or packed documents: a reference and plain torch.

On a GPU with Transformer Engine the layers use its cuDNN attention instead; these run anywhere.
"""

from yoco_megatron.ops.attention.torch import causal_attention, packed_causal_attention

__all__ = ["causal_attention", "packed_causal_attention"]
