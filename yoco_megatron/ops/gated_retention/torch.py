"""Gated retention in plain torch: correct on every device, linear memory in the sequence length.

The chunkwise recurrent representation (paper 2405.05254, "Gated Retention" and App. B). With b_j the log
decay summed from the start of a chunk of C tokens to its token j:

    o_j = sum_{m<=j} exp(b_j - b_m) (q_j . k_m) v_m  +  exp(b_j) q_j R_{c-1}
    R_c = exp(b_C) R_{c-1} + sum_m exp(b_C - b_m) k_m^T v_m

Every exponent is <= 0, so nothing overflows and no second level of chunks is needed. Sums of log decay are
taken inside a chunk only: over a long sequence they reach the thousands, where one float32 rounding already
costs 2e-4 in a decay. Sums also restart at each document, so that no rounding depends on another document.

Tensor legend: B batch, T time, H heads, K key width, V value width, N chunks, C chunk size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_megatron.ops.gated_retention.reference import check_layout, for_each_head


def chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    chunk_size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Gated retention of a whole sequence, differentiable in q, k, v, log_decay and initial_state.

    Shapes: q, k [B, T, H, K], or of fewer heads, each for as many of v's; v [B, T, H, V]; log_decay [B, T, H], natural
    logarithm, finite and <= 0; initial_state [B, H, K, V] (zeros if None); document_ids integers [B, T], see
    reference.py (None: one document). Any T >= 1, any strides. `scale` multiplies k, default K ** -0.5. `chunk_size`
    changes the cost and the rounding, not the result.
    Returns o [B, T, H, V] in q.dtype and the final state [B, H, K, V]. The arithmetic and the final state are
    float32, or float64 if q is float64.
    Raises ValueError for another layout or a chunk size below 1.
    """
    check_layout(q, k, v, log_decay, initial_state, document_ids)
    if chunk_size < 1:
        raise ValueError(f"gated retention needs chunk_size >= 1, got {chunk_size}")
    q, k = for_each_head(q, k, v.shape[2])
    B, T, H, K = q.shape
    V = v.shape[-1]
    compute = compute_dtype(q)
    C = min(chunk_size, T)
    q_BHNCK, k_BHNCK, v_BHNCV = (in_chunks(x, C, compute) for x in (q, k, v))
    k_BHNCK = k_BHNCK * (K**-0.5 if scale is None else scale)
    decay_BHNCC, from_start_BHNC1, to_end_BHNC1 = decays_in_chunks(log_decay, document_ids, C, compute)

    # Inside the chunks: all of them in one batched matmul.
    o_BHNCV = (q_BHNCK @ k_BHNCK.transpose(-1, -2) * decay_BHNCC) @ v_BHNCV

    # Between the chunks: each one's state update, then the scan that carries the state, the only loop.
    update_BHNKV = (k_BHNCK * to_end_BHNC1).transpose(-1, -2) @ v_BHNCV
    chunk_decay_BHN11 = from_start_BHNC1[..., -1:, :]
    S_BHKV = q.new_zeros(B, H, K, V, dtype=compute) if initial_state is None else initial_state.to(compute)
    entering = []
    for decay_BH11, update_BHKV in zip(chunk_decay_BHN11.unbind(2), update_BHNKV.unbind(2), strict=True):
        entering.append(S_BHKV)
        S_BHKV = decay_BH11 * S_BHKV + update_BHKV
    o_BHNCV = o_BHNCV + (q_BHNCK * from_start_BHNC1) @ torch.stack(entering, dim=2)

    o_BTHV = o_BHNCV.flatten(2, 3)[:, :, :T].transpose(1, 2).to(q.dtype).contiguous()
    return o_BTHV, S_BHKV


def step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, S_t = exp(g_t) S_{t-1} + k_t^T v_t and o_t = q_t S_t, for decoding.

    Shapes: q, k [B, H, K]; v [B, H, V]; log_decay [B, H]; state [B, H, K, V] (zeros if None).
    Returns o [B, H, V] in q.dtype and the new state, a new tensor: float32, or float64 if q is float64.
    (The authors decode in bfloat16, where exp(g) above 0.998 rounds to 1 and slow heads never forget.)
    """
    compute = compute_dtype(q)
    K = q.shape[-1]
    q, k = for_each_head(q, k, v.shape[1])
    if state is None:
        state = q.new_zeros(*q.shape, v.shape[-1], dtype=compute)
    k_BHK = k.to(compute) * (K**-0.5 if scale is None else scale)
    decay_BH11 = log_decay.to(compute).exp()[..., None, None]
    S_BHKV = decay_BH11 * state.to(compute) + k_BHK[..., :, None] * v.to(compute)[..., None, :]
    o_BHV = (q.to(compute)[..., None, :] @ S_BHKV).squeeze(-2)
    return o_BHV.to(q.dtype), S_BHKV


def in_chunks(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] of any strides -> contiguous [B, H, N, C, ...], with zeros behind the last token: such keys write
    nothing, and such a log decay leaves the state unchanged."""
    x = x.transpose(1, 2)
    if pad := -x.shape[2] % size:
        x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, pad))
    return x.unflatten(2, (-1, size)).contiguous().to(dtype)


def decays_in_chunks(
    log_decay: Tensor, document_ids: Tensor | None, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What is left of a write by log_decay [B, T, H], 0 in another document, in chunks of `size` tokens.

    Returns:
        from each token to each later one of its chunk [B, H, N, C, C]; from before the chunk to each token and from a
        token to the end of the chunk [B, H, N, C, 1].
    """
    T, device = log_decay.shape[1], log_decay.device
    if document_ids is None:
        document_ids = torch.zeros(1, T, dtype=torch.int32, device=device)
    # Nothing decays into a document's first token, so its decay gets no gradient either.
    starts_BT = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
    log_decay = log_decay.masked_fill(starts_BT[..., None], 0.0)
    # Repeating the last id lets the padding, which writes nothing, belong to the last document.
    ids = torch.cat([document_ids, document_ids[:, -1:].expand(-1, -T % size)], dim=1)
    ids_B1NC = ids.unflatten(1, (-1, size))[:, None]
    before_B1N1 = torch.cat([ids_B1NC[:, :, :1, :1], ids_B1NC[:, :, :-1, -1:]], dim=2)
    b_BHNC = cumsum_by_document(in_chunks(log_decay, size, dtype), ids_B1NC)
    causal_CC = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    visible_B1NCC = causal_CC & (ids_B1NC[..., :, None] == ids_B1NC[..., None, :])
    # Mask before exp: above the diagonal the exponent is positive, and inf * 0 in the backward would be nan.
    decay_BHNCC = (b_BHNC[..., :, None] - b_BHNC[..., None, :]).masked_fill(~visible_B1NCC, -torch.inf).exp()
    from_start_BHNC1 = b_BHNC.masked_fill(ids_B1NC != before_B1N1, -torch.inf).exp()[..., None]
    to_end_BHNC1 = (b_BHNC[..., -1:] - b_BHNC).masked_fill(ids_B1NC != ids_B1NC[..., -1:], -torch.inf).exp()[..., None]
    return decay_BHNCC, from_start_BHNC1, to_end_BHNC1


def cumsum_by_document(x_BHNC: Tensor, ids_B1NC: Tensor) -> Tensor:
    """Inclusive sums within each chunk that restart at each document: log2(C) shifted additions."""
    shift = 1
    while shift < x_BHNC.shape[-1]:
        same = ids_B1NC[..., shift:] == ids_B1NC[..., :-shift]
        x_BHNC = x_BHNC + F.pad(torch.where(same, x_BHNC[..., :-shift], 0.0), (shift, 0))
        shift *= 2
    return x_BHNC


def compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
