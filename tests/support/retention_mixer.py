"""The retention mixer as a chain of plain operations, one tensor after the other: what the fused one must equal.

Tensor legend: S sequence, B batch, H heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_megatron.ops.gated_retention import gated_retention, log_decay_from_logits


def mix(
    qkvg: Tensor,
    logits: Tensor,
    angles: Tensor,
    *,
    tau: float,
    eps: float,
    document_ids: Tensor | None = None,
    backend: str = "torch",
) -> Tensor:
    """Projections of a layer to what its output projection reads.

    Shapes: qkvg [S, B, H * 4 * D], a head's q, k, v and gate side by side; logits [S, B, H]; angles fp32
    [S, 1 or B, 1, D], equal in pairs (2j, 2j+1), which are rotated together; document_ids [B, S] or None. Returns
    [S, B, H * D] in qkvg's dtype. `tau` is the decay's temperature, `eps` the norm's; `backend` the retention's.
    """
    D = angles.shape[-1]
    q, k, v, gate = qkvg.unflatten(-1, (-1, 4, D)).unbind(3)
    cos, sin = angles.cos(), angles.sin()
    log_decay = log_decay_from_logits(logits, tau)
    q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
    o, _ = gated_retention(
        *(x.transpose(0, 1) for x in (q, k, v, log_decay)), document_ids=document_ids, backend=backend
    )
    o = o.transpose(0, 1)
    wide = o if o.dtype == torch.float64 else o.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(o.dtype)
    return (F.silu(gate) * normed).flatten(2)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2j, 2j+1) of x [S, B, H, D] by angles with cos, sin [S, 1 or B, 1, D]; x's dtype back."""
    wide = x if x.dtype == torch.float64 else x.float()
    even, odd = wide[..., ::2], wide[..., 1::2]
    return (wide * cos + torch.stack((-odd, even), -1).flatten(-2) * sin).to(x.dtype)
