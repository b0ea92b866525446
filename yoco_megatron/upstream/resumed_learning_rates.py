"""Resume with learning rates that differ from the checkpoint's.

megatron-core 0.19.2 identifies a checkpoint's parameter groups by their rates, among other things
(`param_group_identifier_keys` in megatron/core/optimizer/optimizer.py), and loads the rates that were saved in them. So
a run with another rate finds none of its groups, whatever --override-opt_param-scheduler says. Here each group has the
checkpoint's rates while it is loaded; the rates of the flags are restored afterwards, if that flag says so.
"""

import contextlib
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yoco_megatron.checkpoint.common_state import common_state, param_groups

RATES = ("max_lr", "min_lr")
# What distinguishes the groups of a model: weights or norms, decoupled by --decoupled-lr or not.
SAME = ("default_config", "wd_mult", "lr_mult", "is_decoupled_lr")


@contextlib.contextmanager
def checkpoint_rates_while_loading(
    checkpoint: Path, options: Namespace, optimizer: Any, scheduler: Any
) -> Iterator[None]:
    """Around loading `checkpoint` (a folder of format torch_dist) into `optimizer` and `scheduler`.

    Does nothing without --override-opt_param-scheduler or --use-checkpoint-opt_param-scheduler: Megatron then refuses
    other rates.
    """
    override = options.override_opt_param_scheduler
    chosen = override or options.use_checkpoint_opt_param_scheduler
    if not chosen or scheduler is None or options.finetune or options.no_load_optim:
        yield
        return
    saved = defaultdict(set)
    for group in param_groups(common_state(checkpoint)["optimizer"]):
        saved[_kind(group)].add(tuple(group.get(rate) for rate in RATES))
    flags = [{rate: group.get(rate) for rate in RATES} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        rates = saved[_kind(group)]
        if len(rates) == 1:  # else Megatron finds it by its own rates, or refuses
            group.update(zip(RATES, *rates))
    yield
    if override:
        for group, own in zip(optimizer.param_groups, flags, strict=True):
            group.update(own)
    # Rate and decay of the next step: Megatron sets them before it knows the checkpoint's decay.
    scheduler.step(increment=0)


def _kind(group: dict[str, Any]) -> tuple:
    return tuple(group.get(name) for name in SAME)
