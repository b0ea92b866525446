"""Attention over a part of a query's keys, which can be merged with attention over its other keys, by log-sum-exp.

Softmax over all keys is the mean of softmaxes over parts of them, weighted by exp(lse), the sum of a part's
exponentials. Its backward over a part needs only the merged output and lse, so parts have no graph of their own here:
the autograd function that merges them calls `forward` and `backward`.

On a GPU this is cuDNN's kernel as torch binds it, on a CPU torch's own.

Legend: B batch, T queries, S keys, H query heads, G key/value heads (H a multiple of G), D head width.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def is_supported(device: torch.device, dtype: torch.dtype, width: int, multiple: int) -> bool:
    """True if these functions take queries of such a dtype, with heads of `width` and all lengths multiples of
    `multiple`.

    On a CPU always. cuDNN takes 16-bit numbers, heads of at most 128 in steps of 8, and lengths in its tiles of 128,
    from Hopper (9.0) on.
    """
    if device.type != "cuda":
        return True
    return (
        dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and width <= 128
        and width % 8 == 0
        and multiple % 128 == 0
    )


def forward(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(o [B, H, T, D] in q's dtype, lse [B, H, T], fp32 or wider, the random state that `backward` takes).

    With `causal` S = T, and query i attends to keys 0..i; else every query attends to every key.
    """
    if q_BHTD.is_cuda:
        o, lse, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q_BHTD, k_BGSD, v_BGSD, None, True, 0.0, causal, False, scale=scale
        )
        return o, lse.squeeze(-1), (seed, offset)
    k, v = (_repeat_heads(x, q_BHTD) for x in (k_BGSD, v_BGSD))
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k, v, 0.0, causal, scale=scale)
    return o, lse, ()


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, rng_state: tuple, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this part's q, k, v; `o`, `lse` and the gradient `do` are those of the merged output."""
    if q.is_cuda:
        lengths = q.shape[2], k.shape[2]
        lse = lse.contiguous()[..., None]
        return aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse, *rng_state, None, None, None, *lengths, 0.0, causal, scale=scale
        )
    wide_k, wide_v = (_repeat_heads(x, q) for x in (k, v))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, wide_k, wide_v, o, lse.contiguous(), 0.0, causal, scale=scale
    )
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def merge_(o: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge another partial result into o, lse, in place."""
    merged_lse = torch.logaddexp(lse, other_lse)
    o.mul_((lse - merged_lse).exp()[..., None]).addcmul_(other_out, (other_lse - merged_lse).exp()[..., None])
    lse.copy_(merged_lse)


def _repeat_heads(x_BGSD: Tensor, q_BHTD: Tensor) -> Tensor:
    """[B, G, S, D] -> [B, H, S, D]: each key/value head once per query head."""
    return x_BGSD.repeat_interleave(q_BHTD.shape[1] // x_BGSD.shape[1], 1)
