"""Causal attention with torch's scaled_dot_product_attention; a window costs memory linear in the sequence.

Queries are the last positions of the keys: of T queries and S >= T keys, query i is at position S - T + i.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head width, W window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn


def causal_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T D^-1/2) v over keys j with i - window < j <= i (paper equations 3 and 4), i = S - T + query.

    Args:
        q_BHTD: [B, H, T, D]; k_BGSD, v_BGSD: [B, G, S, D], H a multiple of G, S >= T; any float dtype.
        window: keys that a query attends to, itself included; None for all earlier ones.
    Returns:
        [B, H, T, D] in q's dtype.
    """
    queries, keys = q_BHTD.shape[2], k_BGSD.shape[2]
    if window is not None and window < keys:
        # Pad the queries to the positions of all keys; in training there are at most a window more keys than queries.
        q_BHSD = F.pad(q_BHTD, (0, 0, keys - queries, 0))
        return _windowed(q_BHSD, k_BGSD, v_BGSD, window)[:, :, keys - queries :]
    if queries == keys:
        return F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, is_causal=True, enable_gqa=True)
    mask: Tensor = causal_lower_right(queries, keys)
    if not q_BHTD.is_cuda:
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSD, attn_mask=mask, enable_gqa=True)


def packed_causal_attention(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    window: int | None = None,
) -> Tensor:
    """`causal_attention` of documents laid end to end; document n has rows cu_seqlens[n] to cu_seqlens[n+1] - 1.

    Args:
        q_THD: [T, H, D]; k_SGD, v_SGD: [S, G, D]; all documents' tokens.
        cu_seqlens_q, cu_seqlens_kv: int32 [documents + 1]; no document has more queries than keys.
        max_seqlen_q, max_seqlen_kv: those of the longest document.
    Returns:
        [T, H, D] in q's dtype.
    """
    if q_THD.is_cuda and q_THD.dtype in (torch.bfloat16, torch.float16):
        window_size = (-1 if window is None else window - 1, 0)
        out = varlen_attn(
            q_THD, k_SGD, v_SGD, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, window_size=window_size
        )
        assert isinstance(out, Tensor)  # a tuple only where more is asked for
        return out
    # Document by document, so that no rounding of one depends on another.
    outputs = []
    keys = cu_seqlens_kv.diff().tolist()
    for qkv in zip(q_THD.split(cu_seqlens_q.diff().tolist()), k_SGD.split(keys), v_SGD.split(keys)):
        q, k, v = (t.transpose(0, 1)[None] for t in qkv)
        outputs.append(causal_attention(q, k, v, window)[0].transpose(0, 1))
    return torch.cat(outputs)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Blocks of W queries attend to their own block and the one before: a [W, 2W] band instead of a [T, T] mask."""
    batch, tokens = q.shape[0], q.shape[2]
    pad = -tokens % window
    q, k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, window)) for t in (q, k, v))
    blocks = q.shape[2]

    def with_previous(t: Tensor) -> Tensor:
        return torch.cat((F.pad(t, (0, 0, 0, 0, 1, 0))[:, :, :-1], t), dim=3)

    # Query r of a block is at position r + W of its 2W keys. In the first block the keys before W do not exist.
    distance = torch.arange(window, 2 * window, device=q.device)[:, None] - torch.arange(2 * window, device=q.device)
    visible = (distance >= 0) & (distance < window)
    first = visible & (torch.arange(2 * window, device=q.device) >= window)
    mask = torch.cat((first[None], visible.expand(blocks - 1, -1, -1)))

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
