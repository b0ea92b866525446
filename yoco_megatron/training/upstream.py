"""The places where a door is missing in Megatron's training loop: what it says of a model knows GPT alone.

`megatron/training/training.py` calls `num_floating_point_operations` for its throughput line and for the total that it
saves, and `report_theoretical_memory` after the first iterations. YOCO's own take their place under the same names.
"""

from argparse import Namespace
from typing import Any

from megatron.training import training

from yoco_megatron.config.shape import ModelShape, parameter_count
from yoco_megatron.training.flops import forward_flops_per_token, train_flops


def count_yoco() -> None:
    """Make Megatron's throughput and size figures those of the model that is trained."""
    training.num_floating_point_operations = num_floating_point_operations
    training.report_theoretical_memory = report_model


def num_floating_point_operations(args: Namespace, batch_size: int, **_: Any) -> float:
    """FLOPs of one training iteration on `batch_size` sequences."""
    return train_flops(ModelShape.from_args(args), batch_size)


_reported = False


def report_model(args: Namespace, num_microbatches: int | None = None, verbose: bool = False) -> None:
    """Print parameters and training FLOPs a token by part, once. (Megatron prints a GPT's memory every time.)"""
    global _reported
    if _reported:
        return
    _reported = True
    shape = ModelShape.from_args(args)
    parameters, flops = parameter_count(shape), forward_flops_per_token(shape)
    print(f"{args.architecture} of {sum(parameters.values()):,} parameters:")
    for part, count in parameters.items():
        print(f"  {part:<22}{count:>16,} parameters")
    print(f"{3 * sum(flops.values()) / 1e9:.3f} GFLOP a token to train, causal, at --seq-length {args.seq_length}:")
    for part, count in flops.items():
        print(f"  {part:<22}{3 * count / 1e9:>16.3f} GFLOP")
