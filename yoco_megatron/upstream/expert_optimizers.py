"""Checkpoints of experts with the distributed optimizer, at another expert parallelism.

Experts that are divided over ranks (--expert-model-parallel-size, or another --expert-tensor-parallel-size than that of
all else) have an optimizer of their own, and undivided ones share that of the other parameters. The states are saved
by the names of parameters in either case; the settings of parameter groups are not, and Megatron finds none where their
number is another one.
"""

from typing import Any

from yoco_megatron.checkpoint.common_state import param_groups
from yoco_megatron.upstream.registry import replaces

STATES = "param_state"


@replaces(
    "megatron.core.optimizer.optimizer",
    "ChainedOptimizer.load_state_dict",
    digest="c3edd61ac5987291",
    why="a checkpoint of divided experts is a KeyError where they are not divided, and the other way round a "
    "RuntimeError",
)
def load_state_dict(self: Any, state_dict: dict) -> None:
    """Give each optimizer the settings of all that were saved: it finds its own groups among them."""
    parts = [state_dict[key] for key in sorted(key for key in state_dict if isinstance(key, int))]
    saved = [part for part in parts if part.keys() - {STATES}] or [state_dict]  # else only what was asked for
    optimizers = self.chained_optimizers
    if len(saved) == len(optimizers):
        load_state_dict.original(self, state_dict)
        return
    own = [state_dict] if len(optimizers) == 1 else [state_dict.get(index, {}) for index in range(len(optimizers))]
    if any(STATES not in part for part in own):
        raise ValueError(
            "the checkpoint is of another --expert-model-parallel-size or --expert-tensor-parallel-size, which "
            "only the distributed optimizer loads: use the same sizes, or save with --use-distributed-optimizer"
        )
    groups = [group for part in saved for group in param_groups(part["optimizer"])]
    others = [group | {"is_expert_parallel": not group["is_expert_parallel"]} for group in groups]
    settings = saved[0] | {"optimizer": {"param_groups": [*others, *groups]}}  # of two alike the later one is found
    for optimizer, part in zip(optimizers, own):
        optimizer.load_state_dict(settings | {STATES: part[STATES]})
    self._synchronize_steps()
