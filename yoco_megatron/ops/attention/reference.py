"""Causal attention by its definition, in float64: slow and obviously right.

Legend: B batch, T queries, S keys, H query heads, G key/value heads (H a multiple of G), D head width.
"""

import torch
from torch import Tensor


def causal_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T D^-1/2) v over keys j with i - window < j <= i (paper equation 4); float64 [B, H, T, D].

    Queries are the last positions of the keys: query 0 is at position i = S - T.
    """
    q, k, v = (t.double() for t in (q_BHTD, k_BGSD, v_BGSD))
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    hidden = (distance < 0) | (distance >= (window or keys))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(hidden.to(q.device), float("-inf"))
    return scores.softmax(-1) @ v
