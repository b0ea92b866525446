"""Repairs of megatron-core 0.19 that every machine, or every machine without Transformer Engine and Apex, needs.

Each function names the upstream code that it repairs. `tests/upstream/test_core_fixes.py` fails when that code changes.
"""

import functools
import itertools
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from typing import Any

import torch


def repair() -> None:
    """Apply all repairs. Call before training; importing `megatron` for the first time happens here."""
    _dataset_helpers_are_compiled()
    _torch_adam_resumes()
    _norm_recompute_without_transformer_engine()
    _optimizer_state_behind_padded_buckets()
    _checkpoint_helper_follows_its_process()


def _dataset_helpers_are_compiled() -> None:
    """core/datasets/utils.py:compile_helpers runs `make` in a folder whose Makefile is not in the wheel, then exits.

    The wheel does hold the compiled extension, so importing it is all there is to do.
    """
    from megatron.core.datasets import utils

    def compile_helpers() -> None:
        import megatron.core.datasets.helpers_cpp  # noqa: F401

    utils.compile_helpers = compile_helpers


def _torch_adam_resumes() -> None:
    """core/optimizer/distrib_optimizer.py cannot load a checkpoint into torch's AdamW (no Apex, no TE):

    - `sharded_state_dict(is_loading=True)` reads the step of a state that does not exist yet;
    - `_set_main_param_and_optimizer_states` looks for a 'step' tensor that no loader supplies;
    - `load_state_dict` gives all parameters ONE step tensor, which AdamW then advances once per parameter, so that
      the bias correction, and with it every later loss, is not that of the undisturbed run.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    cls = distrib_optimizer.DistributedOptimizer
    sharded_state_dict = cls.sharded_state_dict
    load_state_dict = cls.load_state_dict
    set_states = cls._set_main_param_and_optimizer_states

    @functools.wraps(sharded_state_dict)
    def with_state(self, model_sharded_state_dict, is_loading=False, **kwargs):
        if is_loading and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for param in group["params"]:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, **kwargs)

    @functools.wraps(load_state_dict)
    def with_own_steps(self, state_dict):
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(set_states)
    def without_step(self, model_param, tensors):
        with torch.no_grad():
            set_states(self, model_param, {"step": None} | tensors)

    cls.sharded_state_dict = with_state
    cls.load_state_dict = with_own_steps
    cls._set_main_param_and_optimizer_states = without_step


def _norm_recompute_without_transformer_engine() -> None:
    """core/tensor_parallel/random.py:CheckpointWithoutOutput takes its default `fp8=False` for FP8 on (`is not None`).

    Without Transformer Engine the names that it then needs do not exist, and --recompute-modules layernorm dies with
    a NameError.
    """
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE:
        return
    init = random.CheckpointWithoutOutput.__init__

    @functools.wraps(init)
    def without_fp8(self, fp8=False):
        init(self, fp8)
        self.fp8 = False

    random.CheckpointWithoutOutput.__init__ = without_fp8


def _optimizer_state_behind_padded_buckets() -> None:
    """core/optimizer/distrib_optimizer.py saves wrong optimizer state for parameters behind a padded bucket.

    `get_parameter_state_dp_zero` joins the buckets without their padding; `sharded_param_state_fully_reshardable` then
    cuts the parameters out of the whole at their padded offsets. With pipeline stages and tied embeddings, or with any
    bucket that had to be padded, main weights and Adam moments are saved under the wrong parameters, silently.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    save = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(save)
    def at_unpadded_offsets(self, *args, **kwargs):
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                before = [0, *itertools.accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
                shift = [start - bucket.offset for start, bucket in zip(before, buffer.buckets)]
                buffer.param_index_map = {
                    param: (start + shift[bucket], end + shift[bucket], bucket)
                    for param, (start, end, bucket) in buffer.param_index_map.items()
                }
            return save(self, *args, **kwargs)
        finally:
            for buffer, original in zip(self.buffers, padded):
                buffer.param_index_map = original

    DistributedOptimizer.sharded_param_state_fully_reshardable = at_unpadded_offsets


def _checkpoint_helper_follows_its_process() -> None:
    """core/dist_checkpointing/strategies/filesystem_async.py:get_write_results_queue starts a process that stays.

    It outlives a trainer that is killed, with half a gigabyte each; and SIGTERM, which SLURM sends to all processes of
    a job, kills it before the trainer's last save.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from yoco_megatron.runtime.child_process import follow_parent

    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=get_context(mp_mode))
            manager.start(follow_parent)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    filesystem_async.get_write_results_queue = get_write_results_queue
