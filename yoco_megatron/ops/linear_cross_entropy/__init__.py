"""Cross entropy of a linear head without the whole logits: see torch.py."""

from yoco_megatron.ops.linear_cross_entropy.torch import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
