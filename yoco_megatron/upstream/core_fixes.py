"""Repairs of megatron-core 0.19, installed in every process (`startup.prepare`).

Some are for machines without Transformer Engine and Apex alone: they ask for the flag by which Megatron itself chooses.
"""

import functools
import itertools
from argparse import Namespace

import torch

from yoco_megatron.upstream.registry import relies_on, replaces

OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"
RANDOM = "megatron.core.tensor_parallel.random"

repairs = functools.partial(replaces, in_every_process=True)


@repairs(
    "megatron.core.datasets.utils",
    "compile_helpers",
    digest="20d3f59483a0752b",
    why="it runs `make` in a folder whose Makefile is not in the wheel, then exits; the wheel has what it would make",
)
def compile_helpers() -> None:
    import megatron.core.datasets.helpers_cpp  # noqa: F401


def _has_torch_adam(_: Namespace) -> bool:
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


@repairs(
    OPTIMIZER,
    "DistributedOptimizer.sharded_state_dict",
    digest="bb03031188cd8484",
    when=_has_torch_adam,
    why="it reads the step of torch's AdamW from a state that the first step makes: too early in a load, and in a save "
    "while the scale of fp16's loss has skipped every step",
)
def sharded_state_dict(self, model_sharded_state_dict, is_loading=False, **kwargs):
    if not self.optimizer.state:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                self.optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
    return sharded_state_dict.original(self, model_sharded_state_dict, is_loading, **kwargs)


@repairs(
    "megatron.core.optimizer.optimizer",
    "Float16OptimizerWithFloat16Params.sharded_state_dict",
    digest="5f9166a42c892427",
    why="in a save while the scale of fp16's loss has skipped every step it leaves out the moments, which a load "
    "asks for",
)
def float16_sharded_state_dict(self, model_sharded_state_dict, is_loading=False, metadata=None):
    if is_loading or self.optimizer.state or self.init_state_fn is None:
        return float16_sharded_state_dict.original(self, model_sharded_state_dict, is_loading, metadata)
    self.init_state_fn(self.optimizer, self.config)
    found = float16_sharded_state_dict.original(self, model_sharded_state_dict, is_loading, metadata)
    if _has_torch_adam(Namespace()):
        found["optimizer"]["state"]["common_step"] = torch.tensor(0.0)
    self.optimizer.state.clear()  # torch's AdamW would miss the step in it
    return found


@repairs(
    OPTIMIZER,
    "DistributedOptimizer.load_state_dict",
    digest="064a16b31c6dc1af",
    when=_has_torch_adam,
    why="it gives all parameters one step tensor, which torch's AdamW advances once per parameter: another bias "
    "correction, and other losses, than without the restart",
)
def load_state_dict(self, state_dict):
    load_state_dict.original(self, state_dict)
    for state in self.optimizer.state.values():
        state["step"] = state["step"].clone()


relies_on(
    OPTIMIZER,
    "DistributedOptimizer.state_dict",
    digest="b689e6bd27484901",
    used_by="upstream/core_fixes.py",
    why="load_state_dict: it saves one step for all parameters",
)


@repairs(
    OPTIMIZER,
    "DistributedOptimizer._set_main_param_and_optimizer_states",
    digest="606d970ea2136729",
    when=_has_torch_adam,
    why="it looks for a 'step' tensor that no loader supplies",
)
def set_main_param_and_optimizer_states(self, model_param, tensors):
    with torch.no_grad():
        set_main_param_and_optimizer_states.original(self, model_param, {"step": None} | tensors)


def _lacks_transformer_engine(_: Namespace) -> bool:
    from megatron.core.tensor_parallel import random

    return not random.HAVE_TE


@repairs(
    RANDOM,
    "CheckpointWithoutOutput.__init__",
    digest="a92cf7833cbbdecb",
    when=_lacks_transformer_engine,
    why="it takes its default fp8=False for FP8 (`is not None`): --recompute-modules layernorm ends with a NameError",
)
def init_without_fp8(self, fp8=False):
    init_without_fp8.original(self, fp8)
    self.fp8 = False


relies_on(
    RANDOM,
    "CheckpointWithoutOutputFunction.forward",
    digest="e1507b2496e59e78",
    used_by="upstream/core_fixes.py",
    why="CheckpointWithoutOutput.__init__: what it does with `fp8`",
)


@repairs(
    OPTIMIZER,
    "DistributedOptimizer.sharded_param_state_fully_reshardable",
    digest="67a01a93840e6b16",
    why="get_parameter_state_dp_zero joins buckets without their padding, and this cuts the result at padded offsets: "
    "behind a padded bucket, main weights and Adam moments are saved under the wrong parameters, silently",
)
def sharded_param_state_fully_reshardable(self, *args, **kwargs):
    padded = [buffer.param_index_map for buffer in self.buffers]
    try:
        for buffer in self.buffers:
            before = [0, *itertools.accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
            shift = [start - bucket.offset for start, bucket in zip(before, buffer.buckets)]
            buffer.param_index_map = {
                param: (start + shift[bucket], end + shift[bucket], bucket)
                for param, (start, end, bucket) in buffer.param_index_map.items()
            }
        return sharded_param_state_fully_reshardable.original(self, *args, **kwargs)
    finally:
        for buffer, index_map in zip(self.buffers, padded):
            buffer.param_index_map = index_map


relies_on(
    OPTIMIZER,
    "DistributedOptimizer.get_parameter_state_dp_zero",
    digest="c87e8ab28bfd9cae",
    used_by="upstream/core_fixes.py",
    why="sharded_param_state_fully_reshardable: it joins the buckets without their padding",
)


_docstrings: dict[type, dict[str, str]] = {}


@repairs(
    "megatron.training.argument_utils",
    "ArgumentGroupFactory._get_field_docstrings",
    digest="847fb1983b15d180",
    why="it parses config sources for help texts, in each of four parsers (0.1 s each): cache it",
)
def get_field_docstrings(self, src_cfg_class: type) -> dict[str, str]:
    if src_cfg_class not in _docstrings:
        _docstrings[src_cfg_class] = get_field_docstrings.original(self, src_cfg_class)
    return _docstrings[src_cfg_class]
