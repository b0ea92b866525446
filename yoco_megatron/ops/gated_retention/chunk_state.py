"""What a span of tokens does to the state of gated retention, without the span's outputs.

With G_t the log decay summed from the start of the span to token t, and T its last token:

    update     sum_t exp(G_T - G_t) k_t^T v_t      over the tokens of the last token's document
    decay      exp(G_T)                            if the span is one document, else 0
    gradient   sum_t exp(G_t) q_t^T do_t           over the tokens of the first token's document

so that the state after it is decay S + update, and `gradient` is what its outputs send to the state S before it.
Context parallelism exchanges these before the op runs. A sum from either end is exact where its weights are not tiny.

Queries and keys may be of fewer heads, as in the op.

Tensor legend: B batch, T time, H heads, K key width, V value width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def state_update(
    k: Tensor, v: Tensor, log_decay: Tensor, document_ids: Tensor | None = None, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(update [B, H, K, V], decay [B, H]), float32, or float64 if k is.

    Shapes: k [B, T, H, K]; v [B, T, H, V]; log_decay [B, T, H]; document_ids [B, T] as in the op. `scale` multiplies k,
    default K ** -0.5.
    """
    g = log_decay.to(_wide(k))
    # Sum over the tokens after t: the decay that the update of token t still passes through.
    weights = F.pad(g[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1).exp()
    decay = g.sum(1).exp()
    if document_ids is not None:
        weights = weights.masked_fill((document_ids != document_ids[:, -1:])[..., None], 0.0)
        decay = decay.masked_fill((document_ids[:, 0] != document_ids[:, -1])[:, None], 0.0)
    return _outer(k, v, weights * (k.shape[-1] ** -0.5 if scale is None else scale)), decay


def state_gradient(do: Tensor, q: Tensor, log_decay: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """gradient [B, H, K, V], float32, or float64 if q is. Shapes: q [B, T, H, K]; do [B, T, H, V]; others as above."""
    weights = log_decay.to(_wide(q)).cumsum(1).exp()
    if document_ids is not None:
        weights = weights.masked_fill((document_ids != document_ids[:, :1])[..., None], 0.0)
    return _outer(q, do, weights)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _outer(x_BTHK: Tensor, y_BTHV: Tensor, weights_BTH: Tensor) -> Tensor:
    """sum_t weights x_t^T y_t, [B, H, K, V] in the dtype of the weights; half-precision operands on a GPU."""
    half = x_BTHK.is_cuda and x_BTHK.dtype in (torch.bfloat16, torch.float16)
    operand = x_BTHK.dtype if half else weights_BTH.dtype
    options: dict[str, Any] = {"out_dtype": weights_BTH.dtype} if half else {}
    y_BTHV = y_BTHV.to(operand) * weights_BTH.to(operand)[..., None]
    x_BTHK = x_BTHK.repeat_interleave(y_BTHV.shape[2] // x_BTHK.shape[2], 2)
    # One sample at a time: batch and heads of such views do not fold into one dimension without a copy.
    return torch.stack(
        [
            torch.bmm(x_THK.to(operand).permute(1, 2, 0), y_THV.transpose(0, 1), **options)
            for x_THK, y_THV in zip(x_BTHK, y_BTHV)
        ]
    )
