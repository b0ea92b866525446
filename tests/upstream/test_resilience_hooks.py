"""What the hooks of `resilience.loop` and `checkpoint.safety` take for granted about Megatron is still so.

When a digest changes: read the new code and the hook that leans on it, run tests/test_survival.py, put it here.
"""

import ast
from pathlib import Path

import megatron.core
import pytest
from upstream.test_core_fixes import digest

MEGATRON = Path(megatron.core.__file__).parents[1]

KNOWN = {
    # loop.checkpoint_and_decide_exit: its arguments; that it asks signals_received once, first
    ("training/training.py", "checkpoint_and_decide_exit"): "e65e7d2bd8e20f86",
    # loop.train_step: what it returns
    ("training/training.py", "train_step"): "27da8956fe41e571",
    # loop's trigger `save`: its arguments
    ("training/training.py", "save_checkpoint_and_time"): "0b0810e17195d9a2",
    # triggers: the flag is an int32 in an all-gather
    ("training/dist_signal_handler.py", "DistributedSignalHandler.signals_received"): "4885ae00eac5fe5d",
    # guard.prepare: when an update is skipped
    ("core/optimizer/optimizer.py", "ChainedOptimizer.step"): "7a1692f03f53a6f8",
    # safety.save_sharded: the manifest comes after metadata.json, and before "successfully saved"
    ("core/dist_checkpointing/serialization.py", "save"): "40136f3a30285954",
    # training.upstream.skip_step: what it has to do
    ("training/training.py", "dummy_train_step"): "4491804a3c585d58",
    # training.upstream.compile_nothing: that there is nothing to set since torch 2.2
    ("training/initialize.py", "set_jit_fusion_options"): "cf75a41b608209ef",
    # safety.load_checkpoint: that False has the saved state ignored
    ("core/rerun_state_machine.py", "RerunStateMachine.validate_state_dict"): "341641d6197fa2ea",
    # loop._note_exit: in which state it ends with which code
    ("core/rerun_state_machine.py", "RerunStateMachine.should_checkpoint_and_exit"): "f6e17a309cb26c45",
}
REPLACED = {
    "dummy_train_step": 1,
    "train_step": 1,
    "training_log": 1,
    "checkpoint_and_decide_exit": 1,
    "save_checkpoint": 3,  # two of them convert formats
}


@pytest.mark.parametrize(("place", "known"), KNOWN.items(), ids=[place[1] for place in KNOWN])
def test_upstream_is_what_the_hooks_were_written_for(place, known):
    assert digest(*place) == known, f"megatron/{place[0]}: {place[1]} has changed"


@pytest.mark.parametrize("name", REPLACED)
def test_the_loop_calls_what_is_replaced(name):
    text = (MEGATRON / "training/training.py").read_text()
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == name]
    assert len(calls) == REPLACED[name], f"training.py calls {name} at {[call.lineno for call in calls]}"
