"""What a span of tokens does to the state of the gated delta rule, without the span's outputs.

The state after it is M S + w, for the state S before it; M is zero where the span is not one document. Context
parallelism exchanges these before the op runs, and in backward what the outputs send to S.

Tensor legend: B batch, T time, H heads, K key width, V value width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Op = Callable[..., tuple[Tensor, Tensor]]
"""`gated_delta`, of some backend."""


def state_update(
    op: Op, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, document_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(w [B, H, K, V], M [B, H, K, K]), float32, or float64 if k is; shapes of the arguments are the op's.

    M is what becomes of the identity when no value is written, so both are one state, of values as wide as both.
    """
    B, _, H, K = k.shape
    V = v.shape[-1]
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    start = F.pad(torch.eye(K, dtype=dtype, device=k.device), (V, 0)).expand(B, H, K, V + K).contiguous()
    _, final = op(k, k, F.pad(v, (0, K)), log_decay, beta, initial_state=start, document_ids=document_ids)
    w, M = final.split((V, K), dim=-1)
    return w, M


def state_gradient(
    op: Op,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    document_ids: Tensor | None = None,
) -> Tensor:
    """What the outputs' gradient do [B, T, H, V] sends to the state before the span, [B, H, K, V], of w's dtype.

    It does not depend on the values v.
    """
    B, _, H, K = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        state = q.new_zeros(B, H, K, v.shape[-1], dtype=dtype, requires_grad=True)
        o, _ = op(q, k, torch.zeros_like(v), log_decay, beta, initial_state=state, document_ids=document_ids)
    return torch.autograd.grad(o, state, do)[0]
