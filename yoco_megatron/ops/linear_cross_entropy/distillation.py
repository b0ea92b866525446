"""Cross entropy of a linear head, and its divergence from a teacher's, a chunk of tokens at a time.

    ce_t = log sum_v exp(z_tv) - z_t,label             z = x W^T: the student's logits
    kl_t = T^2 sum_v p_tv log(p_tv / q_tv)             p = softmax(y / T), q = softmax(z / T); y: the teacher's logits

    dz_t = dce_t (softmax(z_t) - onehot) + dkl_t T (q_t - p_t)

T^2 keeps the gradient's size as the temperature changes (Hinton et al., arXiv 1503.02531). Neither model's logits of
more than a chunk exist at a time; the rest is as in torch.py, which has the legend. Nothing goes back to the teacher.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from yoco_megatron.ops.linear_cross_entropy.torch import _add_product, _differentiate, _fused, _parts, _summarize

LEAST_LOGIT = -1e30  # its exponential is 0, and so is its product with a probability of 0


def linear_distillation(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    temperature: float,
    chunk_size: int,
    group: dist.ProcessGroup | None = None,
    main_grad: Tensor | None = None,
    teacher_entries: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(cross entropy, divergence from the teacher), each [N], fp32 (float64 for float64), differentiable in x, weight.

    Args:
        x, weight, labels, chunk_size, group, main_grad: as of `linear_cross_entropy`.
        teacher_x: [N, its hidden size]; teacher_weight: [V, its hidden size], the same entries as the student's.
        temperature: T, above 0.
        teacher_entries: entries of the teacher's whole vocabulary; later ones are padding, and have no probability.
    Raises:
        ValueError: shapes that do not fit.
    """
    fits = teacher_x.shape == (len(x), teacher_weight.shape[1]) and len(teacher_weight) == len(weight)
    if not fits or labels.shape != x.shape[:1]:
        raise ValueError(
            "distillation needs the teacher's x [N, h] and weight [V, h] beside the student's, got "
            f"{list(teacher_x.shape)}, {list(teacher_weight.shape)} beside {list(x.shape)}, {list(weight.shape)}"
        )
    first_entry = len(weight) * (dist.get_rank(group) if group is not None else 0)
    real = len(weight) if teacher_entries is None else min(max(teacher_entries - first_entry, 0), len(weight))
    local_labels = labels - first_entry
    local_labels = torch.where((local_labels >= 0) & (local_labels < len(weight)), local_labels, -1)
    return _LinearDistillation.apply(
        x, weight, local_labels, teacher_x, teacher_weight, temperature, real, chunk_size, group, main_grad
    )


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, local_labels, teacher_x, teacher_weight, temperature, real, chunk_size, group, main_grad
    ):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums_5N = x.new_empty(5, len(x), dtype=wide)
        compare = _fused(_compare, x.is_cuda)
        logits = teacher_logits = None
        for part in _parts(len(x), chunk_size):
            del logits, teacher_logits  # before the next ones are made
            logits, teacher_logits = x[part] @ weight.t(), teacher_x[part] @ teacher_weight.t()
            sums_5N[:, part] = compare(logits, teacher_logits, local_labels[part], temperature, real, wide)
        if group is not None and dist.get_world_size(group) > 1:
            sums_5N = _over_ranks(sums_5N, group)
        log_sum, log_sum_tempered, log_sum_teacher, at_label, gap = sums_5N
        ctx.save_for_backward(x, weight, local_labels, teacher_x, teacher_weight, sums_5N[:3])
        ctx.temperature, ctx.real, ctx.chunk_size, ctx.main_grad = temperature, real, chunk_size, main_grad
        ctx.last = (logits, teacher_logits) if any(ctx.needs_input_grad) else None
        return log_sum - at_label, temperature**2 * (gap + log_sum_tempered - log_sum_teacher)

    @staticmethod
    def backward(ctx, dce, dkl):
        x, weight, local_labels, teacher_x, teacher_weight, log_sums_3N = ctx.saved_tensors
        dx = torch.empty_like(x)
        total = torch.zeros_like(weight, dtype=log_sums_3N.dtype) if ctx.main_grad is None else ctx.main_grad
        differentiate = _fused(_differentiate_both, x.is_cuda)
        last, ctx.last = ctx.last, None
        for part in reversed(_parts(len(x), ctx.chunk_size)):
            d_nV, teacher_logits = last or (x[part] @ weight.t(), teacher_x[part] @ teacher_weight.t())
            last = None
            differentiate(
                d_nV, teacher_logits, local_labels[part], log_sums_3N[:, part], dce[part], dkl[part], ctx.temperature,
                ctx.real,
            )  # fmt: skip
            torch.mm(d_nV, weight, out=dx[part])
            _add_product(total, d_nV.t(), x[part])
            del d_nV, teacher_logits  # before the next ones are made
        if ctx.main_grad is None:
            dweight = total.to(weight.dtype)
        else:
            dweight = (torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like)(weight)
        return dx, dweight, *[None] * 8


def _tempered(teacher_logits: Tensor, temperature: float, real: int, wide: torch.dtype) -> Tensor:
    """The teacher's logits over the temperature, of padding the least."""
    tempered = teacher_logits.to(wide) / temperature
    if real < tempered.shape[1]:
        is_padding = torch.arange(tempered.shape[1], device=tempered.device) >= real
        tempered = tempered.masked_fill(is_padding, LEAST_LOGIT)
    return tempered


def _compare(
    logits: Tensor, teacher_logits: Tensor, local_labels: Tensor, temperature: float, real: int, wide: torch.dtype
) -> Tensor:
    """[5, n] in `wide`: logarithms of the sums of exponentials of the student, of it at the temperature, of the
    teacher there; the student's logit of the label or 0; the mean of y/T - z/T by the teacher's probabilities."""
    log_sum, at_label = _summarize(logits, local_labels, wide)
    tempered, teacher = logits.to(wide) / temperature, _tempered(teacher_logits, temperature, real, wide)
    log_sum_teacher = teacher.logsumexp(1)
    gap = ((teacher - log_sum_teacher[:, None]).exp() * (teacher - tempered)).sum(1)
    return torch.stack((log_sum, tempered.logsumexp(1), log_sum_teacher, at_label, gap))


def _over_ranks(sums_5N: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What `_compare` finds, over the whole vocabulary, from what it found in each rank's part."""
    largest_3N = sums_5N[:3].clone()
    dist.all_reduce(largest_3N, op=dist.ReduceOp.MAX, group=group)
    exponentials_3N = (sums_5N[:3] - largest_3N).exp()
    summed = torch.cat((exponentials_3N, sums_5N[3:4], exponentials_3N[2:] * sums_5N[4:]))
    dist.all_reduce(summed, group=group)
    return torch.cat((summed[:3].log() + largest_3N, summed[3:4], summed[4:] / summed[2:3]))


def _differentiate_both(
    logits: Tensor,
    teacher_logits: Tensor,
    local_labels: Tensor,
    log_sums_3n: Tensor,
    dce: Tensor,
    dkl: Tensor,
    temperature: float,
    real: int,
) -> None:
    """Replace the student's logits by their gradient."""
    log_sum, log_sum_tempered, log_sum_teacher = log_sums_3n[:, :, None]
    tempered = logits.to(log_sums_3n.dtype) / temperature
    teacher = _tempered(teacher_logits, temperature, real, log_sums_3n.dtype)
    difference = (tempered - log_sum_tempered).exp() - (teacher - log_sum_teacher).exp()
    _differentiate(logits, local_labels, log_sum[:, 0], dce)
    logits.add_(difference * (temperature * dkl)[:, None])
