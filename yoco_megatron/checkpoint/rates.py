"""A run that goes on with another --lr or --min-lr than its checkpoint's.

megatron-core 0.19.2 finds a checkpoint's parameter groups by their rates, among other things
(`param_group_identifier_keys` in megatron/core/optimizer/optimizer.py), and takes over the rates that were saved in
them. So a run with another rate finds none of its groups, whatever --override-opt_param-scheduler says. Here the groups
have the checkpoint's rates while they are loaded; those of the flags come back afterwards, if the flag says so.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing


@contextlib.contextmanager
def taken_from(checkpoint: Path, options: Namespace, optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Around loading `checkpoint` (a folder of format torch_dist) into `optimizer` and `scheduler`.

    Groups with a rate of their own (--decoupled-lr) keep it. Without --override-opt_param-scheduler or
    --use-checkpoint-opt_param-scheduler nothing is done: another rate is refused.
    """
    override = options.override_opt_param_scheduler
    chosen = override or options.use_checkpoint_opt_param_scheduler
    if not chosen or scheduler is None or options.finetune or options.no_load_optim:
        yield
        return
    saved = dist_checkpointing.load_common_state_dict(checkpoint)["opt_param_scheduler"]
    flags = {"max_lr": options.lr, "min_lr": options.min_lr}
    saved = {name: saved[name] for name in flags}
    _replace(optimizer, flags, saved)
    yield
    if override:
        _replace(optimizer, saved, flags)
        scheduler.step(increment=0)  # the rate of the next step


def _replace(optimizer: Any, old: dict[str, float], new: dict[str, float]) -> None:
    for group in optimizer.param_groups:
        group.update({name: value for name, value in new.items() if group.get(name) == old[name]})
