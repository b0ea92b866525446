"""The unsharded state of a checkpoint: arguments, scheduler, optimizer groups."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from yoco_megatron.checkpoint import safe_unpickling
from yoco_megatron.utils.small_files import BadFile


def common_state(checkpoint: Path) -> dict[str, Any]:
    """Of one checkpoint's folder, format torch_dist; runs no code from it.

    Keys, among others: `iteration`; `args`, Megatron's; `opt_param_scheduler` and `optimizer`, unless saved without.

    Raises:
        BadFile: a checkpoint that is damaged, or of another format.
        OSError: the file system fails.
    """
    safe_unpickling.check_installed()
    safe_unpickling.check_regular(checkpoint)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is")  # a process reads it for itself
            found = dist_checkpointing.load_common_state_dict(checkpoint)
    except (BadFile, OSError):
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, BadFile):
            raise cause from error
        what = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise BadFile(f"{checkpoint} is damaged ({what}): copy it again") from error
    schedule = found.get("opt_param_scheduler") if isinstance(found, dict) else None
    wanted = {"max_lr", "min_lr", "lr_decay_style", "wd_incr_style", "start_wd", "end_wd"}
    if not isinstance(found, dict) or not isinstance(found.get("iteration"), int):
        raise BadFile(f"{checkpoint} does not say of which iteration it is: copy it again")
    if schedule is not None and not (isinstance(schedule, dict) and wanted <= schedule.keys()):
        raise BadFile(f"{checkpoint} holds a schedule that is none: copy it again")
    return found


def param_groups(optimizer: Any) -> Iterator[dict[str, Any]]:
    """All groups in the `optimizer` of a common state, however deeply Megatron's wrappers nest them."""
    if isinstance(optimizer, dict):
        for name, value in optimizer.items():
            yield from value if name == "param_groups" else param_groups(value)
