"""What a layer takes as a whole, in a model of the trainer's: the host to launch it, and all that is no product."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from yoco_megatron import runtime
from yoco_megatron.calibration.timing import seconds
from yoco_megatron.model.builder import model_config_from_args

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
FEW = 512
"""Tokens so few that the host decides."""


def flags(trial: bool) -> list[str]:
    """Of pretrain_yoco.py, for eight layers of the 3B, or two of the tiny model; without Megatron's wrapper there is no
    buffer for gradients that Transformer Engine could add to."""
    model, sizes = ("yoco_tiny", "--num-layers 2") if trial else ("yoco_3b", "--num-layers 8 --bf16")
    rest = (
        f"{sizes} --seq-length 4096 --max-position-embeddings 4096 --vocab-size 1000 --micro-batch-size 1 "
        f"--global-batch-size {os.environ.get('WORLD_SIZE', 1)} --lr 1e-4 --train-iters 1 --mock-data "
        "--tokenizer-type NullTokenizer --eval-iters 0 --no-gradient-accumulation-fusion"
    )
    return ["--config", str(CONFIGS / f"{model}.yaml"), *rest.split()]


def build() -> torch.nn.Module:
    """The model of these flags; Megatron is initialised with them."""
    config = model_config_from_args(get_args())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_distributed_models(pg_collection=groups, wrap_with_ddp=False)
    return unwrap_model(model)[0].train()


def measure(model: torch.nn.Module, at_least: float, trial: bool) -> tuple[float, float]:
    """(seconds of the host for a layer, seconds of the GPU for a token and layer), both forward and backward."""
    layers = get_args().num_layers
    sequences, length = (1, 64) if trial else (2, get_args().seq_length)
    few = seconds(_step(model, 1, min(FEW, length)), at_least) / layers
    many = seconds(_step(model, sequences, length), at_least) / layers / (sequences * length)
    return few, many


def _step(model: torch.nn.Module, sequences: int, length: int) -> Callable[[], object]:
    ids = torch.randint(0, 1000, (sequences, length + 1), device=runtime.device())
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    positions = torch.arange(length, device=runtime.device())[None].expand_as(inputs)

    def step() -> None:
        model(inputs, positions, None, labels=labels).sum().backward()
        model.zero_grad(set_to_none=True)

    return step
