"""The gated delta rule, slow and obviously right: the oracle that every implementation is compared with.

Packed documents are those of gated retention (ops/gated_retention/reference.py): no state crosses from one to the next;
the initial state continues the document of the first token, the final state is that of the last token's.

Tensor legend: B batch, T time, H heads, K key width, V value width. A state is [B, H, K, V], rows = keys.
"""

import torch
from torch import Tensor

from yoco_megatron.ops.gated_retention import reference as retention


def check_layout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    document_ids: Tensor | None,
) -> None:
    """Raises ValueError for another layout than `recurrent`'s."""
    retention.check_layout(q, k, v, log_decay, initial_state, document_ids)
    if beta.shape != log_decay.shape:
        raise ValueError(f"the gated delta rule needs beta of shape {list(log_decay.shape)}, got {list(beta.shape)}")


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time.

    Shapes: q, k [B, T, H, K], k of length 1 at most; v [B, T, H, V]; log_decay [B, T, H], natural logarithm, finite and
    <= 0; beta [B, T, H], from 0 to 1; initial_state [B, H, K, V] (zeros if None); document_ids integers [B, T], equal
    within a document and non-decreasing along T (None: one document). `scale` multiplies q, default K ** -0.5.
    Returns o [B, T, H, V] and the final state [B, H, K, V], both float64.
    Raises ValueError for another layout.
    """
    check_layout(q, k, v, log_decay, beta, initial_state, document_ids)
    q, k, v, log_decay, beta = (x.double() for x in (q, k, v, log_decay, beta))
    K = q.shape[-1]
    S_BHKV = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state.double()
    o_BTHV = []
    for t in range(q.shape[1]):
        if t > 0 and document_ids is not None:
            same_B111 = (document_ids[:, t] == document_ids[:, t - 1])[:, None, None, None]
            S_BHKV = torch.where(same_B111, S_BHKV, 0.0)
        S_BHKV = log_decay[:, t].exp()[..., None, None] * S_BHKV
        held_BHV = torch.einsum("bhk,bhkv->bhv", k[:, t], S_BHKV)
        written_BHV = beta[:, t, :, None] * (v[:, t] - held_BHV)
        S_BHKV = S_BHKV + k[:, t, :, :, None] * written_BHV[..., None, :]
        o_BTHV.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S_BHKV) * (K**-0.5 if scale is None else scale))
    return torch.stack(o_BTHV, dim=1), S_BHKV
