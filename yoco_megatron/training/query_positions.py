"""Which positions of a micro-batch the cross-decoder computes: those with a loss (docs/masked_loss.md)."""

from argparse import Namespace

from torch import Tensor

from yoco_megatron.config.loss_suffix import suffix_length
from yoco_megatron.config.resolve import computed_suffix
from yoco_megatron.parallel.context.query_shard import Runs, queries_multiple, suffix_run

FP8_ROWS = 32
"""Rows of an FP8 product are a multiple of it, whatever the recipe."""


def query_runs(args: Namespace) -> Runs | None:
    """Runs of the positions that are computed, the same in every micro-batch; None for all."""
    queries = computed_suffix(args)
    if queries is None:
        return None
    rows_split = args.tensor_model_parallel_size if args.sequence_parallel else 1
    multiple = queries_multiple(args.context_parallel_size, rows_split)
    if args.fp8:
        multiple *= FP8_ROWS
    run = suffix_run(queries, args.seq_length, multiple)
    return None if run[0][0] == 0 else run


def mask_prefix_(loss_mask: Tensor, args: Namespace) -> None:
    """No loss before the suffix that --loss-suffix names, in place: loss_mask [b, whole sequence]."""
    suffix = suffix_length(args.loss_suffix, args.seq_length)
    if suffix is not None:
        loss_mask[:, : args.seq_length - suffix] = 0
