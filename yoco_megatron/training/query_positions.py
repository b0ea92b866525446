"""Which positions of a micro-batch the cross-decoder computes: those with a loss (docs/masked_loss.md)."""

from argparse import Namespace
from dataclasses import astuple, dataclass
from typing import Self

import numpy as np
from torch import Tensor

from yoco_megatron.config.resolve import computed_suffix
from yoco_megatron.parallel.context.query_runs import num_visible_keys, runs_of
from yoco_megatron.parallel.context.query_shard import Runs, count, queries_multiple, suffix_run


@dataclass(frozen=True)
class PositionCounts:
    """Sums over sequences."""

    positions: int = 0
    with_loss: int = 0
    computed: int = 0
    """Of the positions, behind the shared K,V."""
    keys: int = 0
    """That the computed ones attend to in a cross-decoder layer."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(one + another for one, another in zip(astuple(self), astuple(other))))


def query_runs(args: Namespace) -> Runs | None:
    """Runs of the positions that are computed where the data have no masks: those of --loss-suffix; None for all."""
    queries = computed_suffix(args)
    if queries is None:
        return None
    run = suffix_run(queries, args.seq_length, queries_multiple(args))
    return None if run[0][0] == 0 else run


def masked_query_runs(sample: dict[str, Tensor], args: Namespace) -> tuple[Runs | None, PositionCounts]:
    """Runs of the positions that are computed where a micro-batch's masks leave a loss; None for all.

    Args:
        sample: as the data loader has it, on the host: loss_mask [b, whole sequence], and cu_seqlens with documents.
    """
    has_loss = sample["loss_mask"].numpy() != 0
    sequences, length = has_loss.shape
    runs = runs_of(has_loss.any(0), queries_multiple(args))
    computed = runs or ((0, length),)
    documents = sample.get("cu_seqlens")
    starts = np.zeros((sequences, 1), np.int64) if documents is None else documents.numpy().astype(np.int64)
    return runs, PositionCounts(
        positions=sequences * length,
        with_loss=int(np.count_nonzero(has_loss)),
        computed=sequences * count(computed),
        keys=sum(num_visible_keys(computed, of_sequence) for of_sequence in starts),
    )
