"""pretrain_yoco.py --architecture transformer without what this project changes in Megatron's trainer for any model.

Megatron then asks the GPU for NaN and Inf for every bucket and micro-batch, overlaps gradients and weights with ranks
that are not there, waits for the GPU between pipeline stages, adds residuals by way of torch.compile, and Transformer
Engine takes its own kernels for norms. benchmarks/training.py --stock-gpt runs it as the peer: the GPT of those who use
Megatron as it is.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from yoco_megatron.startup.prepare import prepare

prepare()

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

from pretrain_yoco import datasets_provider
from yoco_megatron import upstream
from yoco_megatron.startup.arguments import parse_and_validate
from yoco_megatron.training import step

# What reports the model's size and FLOPs, from which the benchmarks compute MFU. It costs a step nothing.
ONLY = {"num_floating_point_operations", "report_theoretical_memory"}


def forward_step(data_iterator: Any, model: Any) -> Any:
    """Ours, in Megatron's own schedule."""
    return step.forward_step(step.micro_batches(data_iterator, model), model)


def main(argv: list[str]) -> None:
    """Train as `pretrain_yoco.main`, with Megatron's own trainer."""
    args, model = parse_and_validate(argv, reduce_overhead=False)
    upstream.install(args, ONLY)
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main(sys.argv[1:])
