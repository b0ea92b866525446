"""The unsharded state of a checkpoint: arguments, scheduler, optimizer groups."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from yoco_megatron.checkpoint import safe_unpickling


def common_state(checkpoint: Path) -> dict[str, Any]:
    """Of one checkpoint's folder, format torch_dist; runs no code from it.

    Keys, among others: `iteration`; `args`, Megatron's; `opt_param_scheduler` and `optimizer`, unless saved without.
    """
    safe_unpickling.check_installed()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is")  # a process reads it for itself
        return dist_checkpointing.load_common_state_dict(checkpoint)


def param_groups(optimizer: Any) -> Iterator[dict[str, Any]]:
    """All groups in the `optimizer` of a common state, however deeply Megatron's wrappers nest them."""
    if isinstance(optimizer, dict):
        for name, value in optimizer.items():
            yield from value if name == "param_groups" else param_groups(value)
