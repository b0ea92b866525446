"""A trained model from its checkpoint folder, in one process, whatever mesh it was trained on."""

import os
import socket
from argparse import Namespace
from pathlib import Path

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from megatron.training import get_tokenizer
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron

from yoco_megatron.checkpoint import safe_unpickling
from yoco_megatron.checkpoint.layout import RESOLVED
from yoco_megatron.model.builder import model_config_from_args
from yoco_megatron.startup import arguments

# What a run's config says that one process reading its result must not take over.
ONE_PROCESS = {
    "tensor-model-parallel-size": 1,
    "pipeline-model-parallel-size": 1,
    "context-parallel-size": 1,
    "micro-batch-size": 1,
    "global-batch-size": 1,
    "rampup-batch-size": None,
    "sequence-parallel": False,
    "use-distributed-optimizer": False,
    "overlap-grad-reduce": False,
    "overlap-param-gather": False,
    "overlap-param-gather-with-optimizer-step": False,
    "defer-embedding-wgrad-compute": False,
    "recompute-granularity": None,
    "data-path": None,
    "train-data-path": None,
    "valid-data-path": None,
    "test-data-path": None,
    "data-args-path": None,
    "per-split-data-args-path": None,
    "save": None,
    "tensorboard-dir": None,
    "wandb-project": None,
    "pretrained-checkpoint": None,
    "async-save": False,
    "num-virtual-stages-per-pipeline-rank": None,
    "num-layers-per-virtual-pipeline-stage": None,
    "pipeline-model-parallel-layout": None,
    "tp-comm-overlap": False,
    # What this machine has may be less than what the run had.
    "transformer-impl": None,
    "retention-backend": None,
    "distributed-backend": None,
    "cuda-graph-impl": None,
    "fp8-format": None,
    "fp8-param-gather": False,
    "fp4-format": None,
    "fp4-param-gather": False,
    "reuse-grad-buf-for-mxfp8-param-ag": False,
    "skip-train": True,
    "no-load-optim": True,
    "no-load-rng": True,
    "exit-on-missing-checkpoint": True,
}


def parse_run(folder: str, iteration: int | None = None, **more: object) -> Namespace:
    """The arguments with which one process reads the run in `folder` (its --save); `more` are flags that win.

    Raises:
        ValueError: no checkpoint of pretrain_yoco.py there.
    """
    config = Path(folder) / RESOLVED
    if not config.exists():
        raise ValueError(f"--load {folder}: no resolved_config.yaml there; give the folder that training had as --save")
    items = ONE_PROCESS | {"load": folder, "ckpt-step": iteration} | more
    overrides = [f"{key}={'null' if value is None else value}" for key, value in items.items()]
    return arguments.parse(["--config", str(config), *overrides], reading=True)


def load_model(
    folder: str, iteration: int | None = None, **more: object
) -> tuple[MegatronModule, Namespace, MegatronTokenizerBase]:
    """Load the checkpoint in `folder` (the run's --save), the latest or the given iteration.

    Returns:
        (model in evaluation mode, Megatron's arguments, tokenizer).
    Raises:
        ValueError: no checkpoint of pretrain_yoco.py there.
    """
    args = parse_run(folder, iteration, **more)
    set_environment_of_one_process()
    args = arguments.finalize(args)
    safe_unpickling.check_installed()
    initialize_megatron()
    model_config = model_config_from_args(args)
    builder = model_config.get_builder_cls()(model_config)
    models = builder.build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(), wrap_with_ddp=False
    )
    load_checkpoint(models, None, None)
    return unwrap_model(models)[0].eval(), args, get_tokenizer()


def set_environment_of_one_process() -> None:
    """The environment that torchrun would set for one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        os.environ.setdefault(name, str(value))
