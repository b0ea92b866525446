"""Attention over a part of a query's keys, which can be joined with attention over its other keys.

Softmax over all keys is the mean of softmaxes over parts of them, weighted by exp(lse), the sum of a part's
exponentials. Its backward over a part needs only the joined output and lse, so parts have no graph of their own here:
who joins them calls `forward` and `backward`.

On a GPU this is cuDNN's kernel as torch binds it, on a CPU torch's own.

Legend: B batch, T queries, S keys, H query heads, G key/value heads (H a multiple of G), D head width.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def serves(q_BHTD: Tensor, multiple: int) -> bool:
    """Whether these functions take such queries, all lengths being multiples of `multiple`: any on a CPU; cuDNN takes
    16-bit numbers, heads of at most 128 in steps of 8, and lengths in its tiles of 128, from Hopper (9.0) on."""
    if not q_BHTD.is_cuda:
        return True
    return (
        q_BHTD.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(q_BHTD.device) >= (9, 0)
        and q_BHTD.shape[-1] <= 128
        and q_BHTD.shape[-1] % 8 == 0
        and multiple % 128 == 0
    )


def forward(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(output [B, H, T, D], log of the sum of exponentials [B, H, T], fp32 or wider, what `backward` wants to see).

    With `causal` S = T, and query i sees keys 0..i; else every query sees every key.
    """
    if q_BHTD.is_cuda:
        o, lse, *_, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q_BHTD, k_BGSD, v_BGSD, None, True, 0.0, causal, False, scale=scale
        )
        return o, lse.squeeze(-1), (seed, offset)
    k, v = (_of_each_query_head(x, q_BHTD) for x in (k_BGSD, v_BGSD))
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k, v, 0.0, causal, scale=scale)
    return o, lse, ()


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, seen: tuple, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of this part's q, k, v; `o`, `lse` and the gradient `do` are those of the joined output."""
    if q.is_cuda:
        lengths = q.shape[2], k.shape[2]
        lse = lse.contiguous()[..., None]
        return aten._scaled_dot_product_cudnn_attention_backward(
            do, q, k, v, o, lse, *seen, None, None, None, *lengths, 0.0, causal, scale=scale
        )
    wide_k, wide_v = (_of_each_query_head(x, q) for x in (k, v))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, wide_k, wide_v, o, lse.contiguous(), 0.0, causal, scale=scale
    )
    return dq, *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))


def join(o: Tensor, lse: Tensor, more: Tensor, lse_of_more: Tensor) -> None:
    """Make o, lse, in place, those over their own keys and the others' as well."""
    both = torch.logaddexp(lse, lse_of_more)
    o.mul_((lse - both).exp()[..., None]).addcmul_(more, (lse_of_more - both).exp()[..., None])
    lse.copy_(both)


def _of_each_query_head(x_BGSD: Tensor, q_BHTD: Tensor) -> Tensor:
    return x_BGSD.repeat_interleave(q_BHTD.shape[1] // x_BGSD.shape[1], 1)
