"""Causal attention by its definition, in float64: slow and obviously right.

Legend: B batch, T tokens, H query heads, G key/value heads (H a multiple of G), D head width.
"""

import torch
from torch import Tensor


def causal_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T D^-1/2) v over keys j with i - window < j <= i (paper equation 4); float64 [B, H, T, D]."""
    q, k, v = (t.double() for t in (q_BHTD, k_BGTD, v_BGTD))
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None]
    hidden = (distance < 0) | (distance >= (window or q.shape[2]))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden.to(q.device), float("-inf"))
    return scores.softmax(-1) @ v
