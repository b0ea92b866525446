"""The one place where a door is missing in Megatron's training loop: its FLOP count knows GPT alone.

`megatron/training/training.py` calls `num_floating_point_operations(args, batch_size, ...)` for its throughput line
and for the total that it saves. YOCO's count (training/flops.py) takes its place under the same name.
"""

from argparse import Namespace
from typing import Any

from megatron.training import training

from yoco_megatron.config.shape import ModelShape
from yoco_megatron.training.flops import train_flops


def count_yoco_flops() -> None:
    """Make Megatron's throughput and MFU figures those of the model that is trained."""

    def num_floating_point_operations(args: Namespace, batch_size: int, **_: Any) -> float:
        return train_flops(ModelShape.from_args(args), batch_size)

    training.num_floating_point_operations = num_floating_point_operations
