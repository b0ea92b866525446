"""Causal attention with torch's scaled_dot_product_attention; a window costs memory linear in the sequence.

Legend: B batch, T tokens, H query heads, G key/value heads, D head width, W window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T D^-1/2) v over keys j with i - window < j <= i (paper equations 3 and 4).

    Args:
        q_BHTD: [B, H, T, D]; k_BGTD, v_BGTD: [B, G, T, D], H a multiple of G; any float dtype.
        window: keys a query sees, itself included; None for all earlier ones.
    Returns:
        [B, H, T, D] in q's dtype.
    """
    tokens = q_BHTD.shape[2]
    if window is None or window >= tokens:
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True)
    return _windowed(q_BHTD, k_BGTD, v_BGTD, window)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Blocks of W queries see their own block and the one before: a [W, 2W] band instead of a [T, T] mask."""
    batch, tokens = q.shape[0], q.shape[2]
    pad = -tokens % window
    q, k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, window)) for t in (q, k, v))
    blocks = q.shape[2]

    def with_previous(t: Tensor) -> Tensor:
        return torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t), dim=3)

    # Query r of a block stands at r + W among its 2W keys. In the first block the keys before W do not exist.
    distance = torch.arange(window, 2 * window, device=q.device)[:, None] - torch.arange(2 * window, device=q.device)
    seen = (distance >= 0) & (distance < window)
    first = seen & (torch.arange(2 * window, device=q.device) >= window)
    mask = torch.cat((first[None], seen.expand(blocks - 1, -1, -1)))

    def fold(t: Tensor) -> Tensor:  # [B, heads, blocks, rows, D] -> [B * blocks, heads, rows, D]
        return t.transpose(1, 2).flatten(0, 1)

    out = F.scaled_dot_product_attention(
        fold(q),
        fold(with_previous(k)),
        fold(with_previous(v)),
        attn_mask=mask.repeat(batch, 1, 1)[:, None],
        enable_gqa=True,
    )
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]
