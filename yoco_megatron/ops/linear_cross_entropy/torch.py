"""Cross entropy of a linear head, a chunk of tokens at a time, with the vocabulary split over tensor-parallel ranks.

    loss_t = log sum_v exp(x_t . w_v) - x_t . w_label

The logits of 32,768 tokens and 100,352 words take 13 GB in fp32, those of a chunk of 1024 take 0.4. Forward keeps one
number a token, the logarithm of its sum; backward makes the chunk's logits again (a fourth matrix product where three
would do, in exchange for a gradient that is exact for any weights of the losses):

    dx_t = dloss_t (softmax(x_t W^T) - onehot) W            dW = sum_t dloss_t (softmax - onehot)^T x_t

Matrix products run in the dtype of x, everything between them in fp32 (float64 for float64); dW is summed over chunks
in fp32. Tensor legend: N tokens, n tokens of a chunk, h hidden, V words of this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Losses [N], fp32 (float64 for float64), differentiable in x and weight.

    Args:
        x: [N, h], the same on all ranks of `group`. Its gradient is this rank's part of a sum over `group`.
        weight: [V, h]; rank r holds the words r V to (r + 1) V - 1.
        labels: int64 [N], words of the whole vocabulary.
        chunk_size: tokens whose logits exist at a time.
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
    return _LinearCrossEntropy.apply(x, weight, labels, chunk_size, group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, chunk_size, group):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        ranks = dist.get_world_size(group) if group is not None else 1
        first_word = weight.shape[0] * (dist.get_rank(group) if ranks > 1 else 0)
        local = labels - first_word
        here = (local >= 0) & (local < weight.shape[0])
        local = local.clamp(0, weight.shape[0] - 1)
        log_sum, at_label = x.new_empty(2, len(x), dtype=wide)
        for part in _parts(len(x), chunk_size):
            logits_nV = (x[part] @ weight.t()).to(wide)
            log_sum[part] = logits_nV.logsumexp(1)
            at_label[part] = logits_nV.gather(1, local[part, None]).squeeze(1)
        if ranks > 1:
            # The sum of all words from the sums of each rank's: two small all-reduces for all chunks.
            largest = log_sum.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack(((log_sum - largest).exp(), at_label.masked_fill(~here, 0.0)))
            dist.all_reduce(sums, group=group)
            log_sum, at_label = sums[0].log() + largest, sums[1]
        ctx.save_for_backward(x, weight, local, here, log_sum)
        ctx.chunk_size = chunk_size
        return log_sum - at_label

    @staticmethod
    def backward(ctx, dloss):
        x, weight, local, here, log_sum = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=log_sum.dtype)
        for part in _parts(len(x), ctx.chunk_size):
            d_nV = ((x[part] @ weight.t()).to(log_sum.dtype) - log_sum[part, None]).exp_()
            d_nV.scatter_add_(1, local[part, None], -here[part, None].to(d_nV.dtype))
            d_nV = d_nV.mul_(dloss[part, None]).to(x.dtype)
            torch.mm(d_nV, weight, out=dx[part])
            _add_product(dweight, d_nV.t(), x[part])
        return dx, dweight.to(weight.dtype), None, None, None


def _parts(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with a wide total of narrow factors, in one product on a GPU."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += (a.to(total.dtype)) @ b.to(total.dtype)
