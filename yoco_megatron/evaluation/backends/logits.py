"""From logits to the losses of given tokens, and to the likeliest ones; over tensor-parallel ranks as well."""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

ROWS = 2048
"""Rows of logits that exist in fp32 at a time."""


def read_logits(
    logits: Tensor, labels: Tensor, excluded: Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """(losses of `labels` in nats, fp32; the likeliest ids that are not excluded, int64; of equal ones the lowest).

    Args:
        logits: [rows, V/tp], of any dtype; on rank r of `group` those of ids r V/tp to (r + 1) V/tp - 1.
        labels: int64 [rows].
        excluded: bool [V/tp], of the ids held here.
    """
    parts = zip(logits.split(ROWS), labels.split(ROWS))
    losses, ids = zip(*(_read(part.float(), few, excluded, group) for part, few in parts))
    return torch.cat(losses), torch.cat(ids)


def _read(logits: Tensor, labels: Tensor, excluded: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    width = logits.shape[-1]
    first = width * (group.rank() if group is not None else 0)
    largest = _over_ranks(logits.amax(-1), dist.ReduceOp.MAX, group)
    total = _over_ranks((logits - largest[:, None]).exp().sum(-1), dist.ReduceOp.SUM, group)
    held = (labels >= first) & (labels < first + width)
    own = logits.gather(1, (labels - first).clamp(0, width - 1)[:, None])[:, 0] - largest
    own = _over_ranks(torch.where(held, own, 0.0), dist.ReduceOp.SUM, group)
    allowed = logits.masked_fill(excluded | logits.isnan(), -torch.inf)  # a broken model names an id, too
    values, ids = allowed.max(-1)
    ids = allowed.eq(values[:, None]).int().argmax(-1) + first  # max() may return any of equal ones
    best = _over_ranks(values.clone(), dist.ReduceOp.MAX, group)
    ids = _over_ranks(torch.where(values == best, ids, torch.iinfo(ids.dtype).max), dist.ReduceOp.MIN, group)
    return total.log() - own, ids


def _over_ranks(x: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, operation, group=group)
    return x


def excluded_ids(
    banned: Collection[int], vocab_size: int | None, first: int, width: int, device: torch.device
) -> Tensor:
    """bool [width] of ids first to first + width - 1: those that no continuation has.

    Args:
        vocab_size: rows from it on are padding of the vocabulary; None for none.
    """
    ids = torch.arange(first, first + width, device=device)
    padding = torch.zeros_like(ids, dtype=torch.bool) if vocab_size is None else ids >= vocab_size
    return padding | torch.isin(ids, torch.tensor(sorted(banned), dtype=ids.dtype, device=device))
