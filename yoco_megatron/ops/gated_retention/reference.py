"""Gated retention, slow and obviously right: the oracle that every kernel is compared with.

    recurrent    S_t = exp(g_t) S_{t-1} + k_t^T v_t ,     o_t = q_t S_t
    parallel     o_t = sum_{m<=t} exp(G_t - G_m) (q_t . k_m) v_m ,     G_t = sum_{i<=t} g_i

(paper 2405.05254, "Gated Retention": the recurrent and the parallel representation, Eq. 5 and following)
with keys scaled by K^-1/2 (the authors' code; the equations leave it out). Both forms run in float64 whatever
they are given, and autograd goes through both. The paper prints the decay matrix transposed and its appendix
mixes up the gate variables; this is the consistent reading, on which the two forms agree to 1e-15.

Packed documents: `document_ids` [B, T] names the document of each token. A state never crosses a document boundary;
the initial state continues the document of the first token, the final state is that of the last token's document.

Tensor legend: B batch, T time, H heads, K key width, V value width. A state is [B, H, K, V], rows = keys.
"""

import torch
from torch import Tensor


def check_layout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    document_ids: Tensor | None = None,
) -> None:
    """Check that tensors have the layout shared by every backend of this op.

    T >= 1; q, k [B, T, H, K], or of fewer heads, each for as many of v's; v [B, T, H, V]; log_decay [B, T, H];
    initial_state [B, H, K, V] or None; document_ids integers [B, T] or None.
    Raises ValueError, because a wrong layout (heads first, say) would often broadcast into a wrong result.
    """
    if q.ndim != 4 or q.shape[1] == 0 or k.shape != q.shape:
        raise ValueError(
            "gated retention needs q and k of one shape [B, T, H, K] with T >= 1, "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    B, T, shared, K = q.shape
    if v.ndim != 4 or v.shape[:2] != q.shape[:2] or v.shape[2] % shared:
        raise ValueError(
            f"gated retention needs v of shape [{B}, {T}, H, V], H a multiple of {shared}, got {list(v.shape)}"
        )
    H = v.shape[2]
    if log_decay.shape != v.shape[:3]:
        raise ValueError(f"gated retention needs log_decay of shape [{B}, {T}, {H}], got {list(log_decay.shape)}")
    state_shape = (B, H, K, v.shape[-1])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(
            f"gated retention needs initial_state of shape {list(state_shape)}, got {list(initial_state.shape)}"
        )
    if document_ids is not None and (document_ids.shape != (B, T) or document_ids.is_floating_point()):
        raise ValueError(
            f"gated retention needs document_ids as integers of shape [{B}, {T}], "
            f"got {document_ids.dtype} {list(document_ids.shape)}"
        )


def for_each_head(q: Tensor, k: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """q and k [..., H, K] of all heads, from those of fewer, each for neighbouring heads."""
    if q.shape[-2] == heads:
        return q, k
    group = heads // q.shape[-2]
    return q.repeat_interleave(group, -2), k.repeat_interleave(group, -2)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token at a time (the paper's recurrent representation).

    Shapes: q, k [B, T, H, K] (or of fewer heads, see `check_layout`); v [B, T, H, V]; log_decay [B, T, H], natural
    logarithm, finite and <= 0; initial_state [B, H, K, V] (zeros if None); document_ids [B, T], equal within a document
    and non-decreasing along T (None: one document). `scale` multiplies k, default K ** -0.5.
    Returns o [B, T, H, V] and the final state [B, H, K, V], both float64.
    Raises ValueError for another layout.
    """
    q_BTHK, k_BTHK, v_BTHV, g_BTH, S_BHKV = _to_float64(q, k, v, log_decay, initial_state, scale, document_ids)
    o_BTHV = []
    for t in range(q_BTHK.shape[1]):
        if t > 0 and document_ids is not None:
            same_B111 = (document_ids[:, t] == document_ids[:, t - 1])[:, None, None, None]
            S_BHKV = torch.where(same_B111, S_BHKV, 0.0)
        decay_BH11 = g_BTH[:, t].exp()[..., None, None]
        S_BHKV = decay_BH11 * S_BHKV + k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None, :]
        o_BTHV.append(torch.einsum("bhk,bhkv->bhv", q_BTHK[:, t], S_BHKV))
    return torch.stack(o_BTHV, dim=1), S_BHKV


def parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The form that looks like attention (the paper's parallel representation), quadratic in T.

    Arguments, results, dtypes and errors are those of `recurrent`. An initial state enters as if it had been
    written before the first token: it is read by token t after t decays.
    """
    q_BTHK, k_BTHK, v_BTHV, g_BTH, S_BHKV = _to_float64(q, k, v, log_decay, initial_state, scale, document_ids)
    T = q_BTHK.shape[1]
    G_BHT = g_BTH.transpose(1, 2).cumsum(-1)
    visible_BTT = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[None]
    first_BT = last_BT = torch.ones(1, T, dtype=torch.bool, device=q.device)
    if document_ids is not None:
        visible_BTT = visible_BTT & (document_ids[:, :, None] == document_ids[:, None, :])
        first_BT, last_BT = visible_BTT[:, :, 0], visible_BTT[:, -1, :]
    # Mask the exponent, not the exponential: above the diagonal it is positive and exp could overflow.
    decay_BHTT = (G_BHT[..., :, None] - G_BHT[..., None, :]).masked_fill(~visible_BTT[:, None], -torch.inf).exp()
    scores_BHTT = torch.einsum("bthk,bmhk->bhtm", q_BTHK, k_BTHK) * decay_BHTT
    o_BTHV = torch.einsum("bhtm,bmhv->bthv", scores_BHTT, v_BTHV)
    from_start_BHT = G_BHT.masked_fill(~first_BT[:, None], -torch.inf).exp()
    o_BTHV = o_BTHV + torch.einsum("bht,bthk,bhkv->bthv", from_start_BHT, q_BTHK, S_BHKV)
    to_end_BHT = (G_BHT[..., -1:] - G_BHT).masked_fill(~last_BT[:, None], -torch.inf).exp()
    final_BHKV = torch.einsum("bht,bthk,bthv->bhkv", to_end_BHT, k_BTHK, v_BTHV)
    return o_BTHV, final_BHKV + from_start_BHT[..., -1][..., None, None] * S_BHKV


def _to_float64(q, k, v, log_decay, initial_state, scale, document_ids):
    check_layout(q, k, v, log_decay, initial_state, document_ids)
    q, k = for_each_head(q, k, v.shape[2])
    B, _, H, K = q.shape
    if initial_state is None:
        initial_state = q.new_zeros(B, H, K, v.shape[-1], dtype=torch.float64)
    scale = K**-0.5 if scale is None else scale
    return q.double(), k.double() * scale, v.double(), log_decay.double(), initial_state.double()
