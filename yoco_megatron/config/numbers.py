"""Numbers on the command line that no size, count, rate or interval can be: one rule for every flag."""

import argparse
import math
from typing import Any

from yoco_megatron.utils.errors import require

# Where a negative number means something, and the default is none.
SIGNED = {
    "moe_router_force_biased",
    "moe_paged_stash_buffer_size_factor_cuda",
    "moe_paged_stash_buffer_size_factor_cpu",
    "inference_dynamic_batching_num_cuda_graphs",
}
# Besides sizes and intervals. Megatron divides by 0, takes it for "not set", or builds nothing.
ABOVE_ZERO = {
    "distributed_timeout_minutes",
    "exit_duration_in_mins",
    "hysteresis",
    "initial_loss_scale",
    "loss_scale",
    "loss_scale_window",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "min_loss_scale",
    "num_attention_heads",
    "num_dataset_builder_threads",
    "num_distributed_optimizer_instances",
    "num_layers",
    "num_query_groups",
    "shared_kv_sets",
    "recompute_num_layers",
    "self_decoder_head_dim",
    "rope_scaling_factor",
    "rotary_base",
    "seed",
    "seq_length",
    "train_iters",
    "train_samples",
}
MAY_BE_ZERO = {"loss_chunk_size", "ddp_bucket_size"}
LIMITS = {
    "seed": 2**31,  # numpy takes 32 bits, and Megatron adds to it
    "hang_timeout": 60 * 24 * 365,  # a year, which clocks can hold
}
BELOW_ONE = {
    "adam_beta1",
    "adam_beta2",
    "attention_dropout",
    "hidden_dropout",
    "lion_beta1",
    "lion_beta2",
    "lr_warmup_fraction",
    "muon_momentum",
    "sgd_momentum",
}


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Every number must be finite, and at least 0 unless its default is negative.

    Raises:
        ValueError: the first that is not, by its flag.
    """
    for action in parser._actions:
        given: Any = getattr(args, action.dest, None)
        if given == action.default or action.type not in (int, float):
            continue
        for value in given if isinstance(given, list) else [given]:
            _check(action, value)


def _check(action: argparse.Action, value: float) -> None:
    flag, dest, default = action.option_strings[0], action.dest, action.default
    told = f"{flag} {value}"
    counts = dest.endswith(("_size", "_interval")) and default != 0 and dest not in MAY_BE_ZERO
    require(isinstance(value, int) or math.isfinite(value), f"{told} must be a finite number")
    require(abs(value) < LIMITS.get(dest, 2**63 if isinstance(value, int) else math.inf), f"{told} is too large")
    least = "at least 1" if action.type is int else "above 0"
    require(value > 0 or not (dest in ABOVE_ZERO or counts), f"{told} must be {least}")
    signed = dest in SIGNED or (isinstance(default, int | float) and default < 0)
    require(signed or value >= 0, f"{told} must not be negative")
    require(dest not in BELOW_ONE or value < 1, f"{told} must be below 1")
