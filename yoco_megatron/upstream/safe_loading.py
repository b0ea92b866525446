"""Installs the restricted unpicklers of checkpoint/safe_unpickling.py in every process."""

import functools
import io
import pickle
import sys
from argparse import Namespace
from types import SimpleNamespace

import torch
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.planner import ReadItem

from yoco_megatron import runtime
from yoco_megatron.checkpoint.safe_unpickling import load_fp8_state, load_metadata, stand_in_for
from yoco_megatron.upstream.registry import relies_on, replaces

loads_safely = functools.partial(replaces, in_every_process=True)


def _pickle_with(**functions) -> SimpleNamespace:
    return SimpleNamespace(**vars(pickle) | functions)


loads_safely(
    "torch.distributed.checkpoint.filesystem",
    "pickle",
    digest=None,
    why="a checkpoint's `.metadata` is unpickled without restraint: it may only name classes that such a file needs",
)(_pickle_with(load=load_metadata))
relies_on(
    "torch.distributed.checkpoint.filesystem",
    "FileSystemReader.read_metadata",
    digest="03bb3f8561a7c4b4",
    used_by="upstream/safe_loading.py",
    why="it calls pickle.load, and nothing else of pickle reads a checkpoint",
)


@loads_safely(
    "torch.distributed.checkpoint.default_planner",
    "DefaultLoadPlanner.load_bytes",
    digest="3e1f1187575e6b10",
    why="every entry that is no tensor is unpickled without restraint: weights_only=True allows a list of harmless "
    "classes, which Megatron has extended",
)
def load_bytes(self: default_planner.DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    loaded = torch.load(value, weights_only=True)
    name = read_item.dest_index.fqn
    if self.flatten_state_dict:
        default_planner.set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded


def _has_transformer_engine(_: Namespace) -> bool:
    return runtime.has_transformer_engine()


# All that unpickles in Transformer Engine. One question answers for both, so both are restrained before it is.
for module in ("transformer_engine.pytorch.module.base", "transformer_engine.pytorch.ops.op"):
    loads_safely(
        module,
        "pickle",
        digest=None,
        when=_has_transformer_engine,
        why="the FP8 scales in a checkpoint are a pickle: it may only name what such a state is made of",
    )(_pickle_with(loads=load_fp8_state))


@loads_safely(
    "transformer_engine.pytorch._extra_state",
    "unsafe_pickle_extra_state_enabled",
    digest=None,
    when=lambda args: _has_transformer_engine(args) and "transformer_engine.pytorch._extra_state" in sys.modules,
    why="newer versions refuse to load that pickle unless an environment variable lets everything in",
)
def unsafe_pickle_extra_state_enabled() -> bool:
    return True


def restrain_weights_only() -> None:
    """Change what torch.load lets in beside tensors with `weights_only=True`: Megatron's list. A door of torch.

    One class more, of a checkpoint that asks to run a step again elsewhere; and stand-ins for what a pickle could
    change for the whole process, the members of enumerations, or crash it with, a random generator's state.
    """
    from megatron.core.rerun_state_machine import Call, Caller

    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*map(stand_in_for, allowed), Call, Caller])
