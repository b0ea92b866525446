"""A checkpoint without the layers of multi-token prediction that a run has: they begin with their initial weights."""

import re
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.training import get_args

from yoco_megatron.upstream.registry import replaces

# A tensor of such a layer, or of the optimizer's state of it.
OF_LAYER = re.compile(r"(?:optimizer\.state\.(?P<state>\w+)\.)?(?P<name>mtp_(?P<depth>\d+)\..+)")
MASTER_WEIGHT = ("param", "fp32_param")  # of the distributed optimizer, and of the other in 16 bits


@replaces(
    "megatron.core.dist_checkpointing",
    "load",
    digest="75613cb07f50a00d",
    why="every tensor that is asked for must be in the checkpoint, or the run ends",
)
def load_sharded(sharded_state_dict: dict, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
    """Megatron's load, which leaves new layers as they are, with an empty optimizer state."""
    wanted = get_args().mtp_num_layers
    if wanted is not None:
        saved = {
            int(found["depth"]) for key in load_sharded_metadata(checkpoint_dir) if (found := OF_LAYER.search(key))
        }
        new = set(range(wanted)) - saved
        if dist.get_rank() == 0:
            tell(checkpoint_dir, new, saved - set(range(wanted)))
        if new:
            keep(sharded_state_dict, new)
    return load_sharded.original(sharded_state_dict, checkpoint_dir, *args, **kwargs)


def tell(checkpoint: str, new: set[int], lost: set[int]) -> None:
    """Print which layers of multi-token prediction, counted from 1, are new, and which are left out."""
    for layers, what in ((new, "lacks {}: their weights are the initial ones"), (lost, "has {}: they are left out")):
        if layers:
            named = ", ".join(f"mtp_{depth + 1}" for depth in sorted(layers))
            print(f"WARNING: --mtp-num-layers: the checkpoint {checkpoint} {what.format(named)}", flush=True)


def keep(sharded_state_dict: dict, new: set[int]) -> None:
    """Ask the checkpoint for nothing of the layers `new`, counted from 0, whose state is made here."""
    entries = (entry for entry in nested_values(sharded_state_dict) if isinstance(entry, ShardedBase))
    weights = {entry.key: entry.data for entry in entries}

    def value(entry: Any) -> Any:
        found = OF_LAYER.search(entry.key) if isinstance(entry, ShardedBase) else None
        if found is None or int(found["depth"]) not in new:
            return entry
        if found["state"] is None:
            return LocalNonpersistentObject(entry.data)
        if found["state"] in MASTER_WEIGHT:  # the optimizer's own copy is empty while it is loaded
            return LocalNonpersistentObject(weights[found["name"]].detach().float())
        return LocalNonpersistentObject(torch.zeros_like(entry.data))

    dict_list_map_inplace(value, sharded_state_dict)
