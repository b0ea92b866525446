"""Losses of a linear head without the whole logits: see torch.py, and distillation.py for those with a teacher."""

from yoco_megatron.ops.linear_cross_entropy.distillation import linear_distillation
from yoco_megatron.ops.linear_cross_entropy.torch import linear_cross_entropy

__all__ = ["linear_cross_entropy", "linear_distillation"]
