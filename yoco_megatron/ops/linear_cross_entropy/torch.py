"""Cross entropy of a linear head, a chunk of tokens at a time, with the vocabulary split over tensor-parallel ranks.

    loss_t = log sum_v exp(x_t . w_v) - x_t . w_label

The logits of 32,768 tokens and a vocabulary of 100,352 take 13 GB in fp32; those of a chunk of 8192, 1.6 GB in bf16,
are all that exists at a time. Forward saves one number per token, the logarithm of its sum, and the last chunk's
logits, with which backward begins. Backward recomputes the other chunks' logits: a fourth matrix product where three
would do, in exchange for a gradient that is exact for any weights of the losses.

    dx_t = dloss_t (softmax(x_t W^T) - onehot) W            dW = sum_t dloss_t (softmax - onehot)^T x_t

Matrix products run in the dtype of x, everything between them in fp32 (float64 for float64); dW is summed over chunks
in fp32. On a GPU what lies between the products is one fused kernel each way: forward reads the logits, backward
replaces them by their gradient. Tensor legend: N tokens, n tokens of a chunk, h hidden, V vocabulary entries of
this rank.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(losses, logarithms of their sums of exponentials), each [N], fp32 (float64 for float64), differentiable in x and
    weight.

    Args:
        x: [N, h], the same on all ranks of `group`. Its gradient is this rank's part of a sum over `group`.
        weight: [V, h]; rank r holds the vocabulary entries r V to (r + 1) V - 1.
        labels: int64 [N], token ids of the whole vocabulary.
        chunk_size: most tokens whose logits exist at a time; the chunks are as equal as they can be.
        main_grad: [V, h] of x's dtype or fp32, to which backward adds the weight's gradient. Autograd then gets an
            uninitialised tensor, as in Megatron (never read), or zeros if `weight.zero_out_wgrad` says that another
            gradient is added to it.
    Raises:
        ValueError: shapes that do not fit, or chunk_size < 1.
    """
    if x.ndim != 2 or labels.shape != x.shape[:1] or weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            "linear cross entropy needs x [N, h], weight [V, h] and labels [N], "
            f"got {list(x.shape)}, {list(weight.shape)} and {list(labels.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"linear cross entropy needs chunk_size >= 1, got {chunk_size}")
    if main_grad is not None and main_grad.shape != weight.shape:
        raise ValueError(f"main_grad {list(main_grad.shape)} must be shaped like the weight {list(weight.shape)}")
    return _LinearCrossEntropy.apply(x, weight, labels, chunk_size, group, main_grad)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, chunk_size, group, main_grad):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        ranks = dist.get_world_size(group) if group is not None else 1
        first_entry = weight.shape[0] * (dist.get_rank(group) if ranks > 1 else 0)
        local_labels = labels - first_entry
        local_labels = torch.where((local_labels >= 0) & (local_labels < weight.shape[0]), local_labels, -1)
        log_sum, at_label = x.new_empty(2, len(x), dtype=wide)
        summarize = _fused(_summarize, x.is_cuda)
        logits_nV = None
        for part in _parts(len(x), chunk_size):
            del logits_nV  # before the next ones are made
            logits_nV = x[part] @ weight.t()
            log_sum[part], at_label[part] = summarize(logits_nV, local_labels[part], wide)
        if ranks > 1:
            # The sum over the vocabulary from each rank's sum: two small all-reduces for all chunks.
            largest = log_sum.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack(((log_sum - largest).exp(), at_label))
            dist.all_reduce(sums, group=group)
            log_sum, at_label = sums[0].log() + largest, sums[1]
        ctx.save_for_backward(x, weight, local_labels, log_sum)
        ctx.chunk_size, ctx.main_grad = chunk_size, main_grad
        ctx.last_logits = logits_nV if any(ctx.needs_input_grad) else None
        return log_sum - at_label, log_sum.clone()

    @staticmethod
    def backward(ctx, dloss, dlog_sum):
        x, weight, local_labels, log_sum = ctx.saved_tensors
        dx = torch.empty_like(x)
        total = torch.zeros_like(weight, dtype=log_sum.dtype) if ctx.main_grad is None else ctx.main_grad
        differentiate = _fused(_differentiate, x.is_cuda)
        d_nV, ctx.last_logits = ctx.last_logits, None
        for part in reversed(_parts(len(x), ctx.chunk_size)):
            if d_nV is None:
                d_nV = x[part] @ weight.t()
            differentiate(d_nV, local_labels[part], log_sum[part], dloss[part], dlog_sum[part])
            torch.mm(d_nV, weight, out=dx[part])
            _add_product(total, d_nV.t(), x[part])
            d_nV = None  # before the next one is made
        if ctx.main_grad is None:
            dweight = total.to(weight.dtype)
        else:
            dweight = (torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like)(weight)
        return dx, dweight, None, None, None, None


def _summarize(logits_nV: Tensor, local_labels: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logarithm of the sum of exponentials, logit of the label or 0 where that is -1), each [n] in `wide`."""
    logits_nV = logits_nV.to(wide)
    at_label = logits_nV.gather(1, local_labels.clamp(min=0)[:, None]).squeeze(1)
    return logits_nV.logsumexp(1), torch.where(local_labels >= 0, at_label, 0.0)


def _differentiate(
    logits_nV: Tensor, local_labels: Tensor, log_sum: Tensor, dloss: Tensor, dlog_sum: Tensor | None = None
) -> None:
    """Replace logits by their gradient, dloss (softmax - onehot) + dlog_sum softmax."""
    probability = (logits_nV.to(log_sum.dtype) - log_sum[:, None]).exp()
    onehot = torch.arange(logits_nV.shape[1], device=local_labels.device) == local_labels[:, None]
    d_nV = (probability - onehot.to(probability.dtype)) * dloss[:, None]
    logits_nV.copy_(d_nV if dlog_sum is None else d_nV + probability * dlog_sum[:, None])


def _fused(function: Callable, on_gpu: bool) -> Callable:
    return _compiled(function) if on_gpu else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    # For the first chunk's length; a shorter last chunk makes torch compile a second kernel, for any length.
    return torch.compile(function)


def _parts(length: int, size: int) -> list[slice]:
    size = -(-length // max(1, -(-length // size)))  # as many parts, but of equal size
    return [slice(start, min(start + size, length)) for start in range(0, length, size)] if length else []


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where `total` may be wider than the factors; one product on a GPU."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += (a.to(total.dtype)) @ b.to(total.dtype)
