"""Loading a checkpoint runs no code from it.

torch.distributed.checkpoint unpickles two things without restraint: the file `.metadata`
(torch/distributed/checkpoint/filesystem.py:read_metadata) and every entry that is no tensor
(torch/distributed/checkpoint/default_planner.py:load_bytes). Here the first may only name the classes that such a file
is made of, and the second is loaded with `weights_only=True`, whose list of harmless classes Megatron has extended.
"""

import io
import logging
import pickle
import types
from typing import IO, Any

import torch
from torch.distributed.checkpoint import default_planner, filesystem
from torch.distributed.checkpoint.planner import ReadItem

logger = logging.getLogger(__name__)

# module -> names that may be looked up there; None for all of a module that holds plain records.
ALLOWED: dict[str, set[str] | None] = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "builtins": {"set", "frozenset", "slice"},
}


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's `.metadata`, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises ValueError for a name that no `.metadata` needs."""
        if module in ALLOWED and (ALLOWED[module] is None or name in ALLOWED[module]) and "." not in name:
            return super().find_class(module, name)
        message = (
            f"--load: the checkpoint's .metadata names {module}.{name}, which no checkpoint needs and which could run "
            "code: do not trust this folder"
        )
        logger.error(message)  # torch's loader goes on without metadata and then says only that there is none
        raise ValueError(message)


def _load_metadata(file: IO[bytes]) -> Any:
    return MetadataUnpickler(file).load()


def _load_bytes(self: default_planner.DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    loaded = torch.load(value, weights_only=True)
    name = read_item.dest_index.fqn
    if self.flatten_state_dict:
        default_planner.set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def install() -> None:
    """Apply both to torch.distributed.checkpoint, for this process."""
    filesystem.pickle = types.SimpleNamespace(**vars(pickle) | {"load": _load_metadata})
    default_planner.DefaultLoadPlanner.load_bytes = _load_bytes
    from megatron.core.rerun_state_machine import Call, Caller

    torch.serialization.add_safe_globals([Call, Caller])  # in a checkpoint that asks to run a step again elsewhere
