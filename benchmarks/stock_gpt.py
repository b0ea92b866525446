"""pretrain_yoco.py --architecture transformer without what this project changes in Megatron's trainer for any model.

Megatron then asks the GPU for NaN and Inf for every bucket and micro-batch, overlaps gradients and weights with ranks
that are not there, waits for the GPU between pipeline stages, adds residuals by way of torch.compile, and Transformer
Engine takes its own kernels for norms. benchmarks/training.py --stock-gpt runs it as the peer: the GPT of those who
use Megatron as it is.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pretrain_yoco
from yoco_megatron.startup import arguments


def as_megatron_does(*_: Any) -> None:
    """In the place of a change."""


for change in ("schedule_steps", "compile_what_is_called", "take_norms_of_cudnn"):
    assert hasattr(pretrain_yoco, change)
    setattr(pretrain_yoco, change, as_megatron_does)
assert hasattr(arguments, "_spare_the_host")
arguments._spare_the_host = as_megatron_does

if __name__ == "__main__":
    pretrain_yoco.main(sys.argv[1:])
