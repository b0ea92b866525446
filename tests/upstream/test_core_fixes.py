"""Repairs that show at once: what they repair is still broken upstream, and works here; else the repair can go."""

import argparse
import inspect
from pathlib import Path

import megatron.core
import pytest
from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments
from support.cli import TINY, train

from yoco_megatron.upstream import core_fixes

MEGATRON = Path(megatron.core.__file__).parents[1]


def test_dataset_helpers(monkeypatch):
    from megatron.core.datasets import helpers_cpp, utils

    assert helpers_cpp.build_sample_idx_int32
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("ran make"))
    utils.compile_helpers()
    assert not (MEGATRON / "core" / "datasets" / "Makefile").exists(), "the wheel can compile now: drop the repair"


def test_norm_recompute():
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE:
        pytest.skip("with Transformer Engine nothing is repaired")
    repaired = random.CheckpointWithoutOutput(False)
    assert repaired.fp8 is False
    original = object.__new__(random.CheckpointWithoutOutput)
    random.CheckpointWithoutOutput.__init__.original(original, False)
    assert original.fp8 is True, "upstream takes fp8=False for what it says now: drop the repair"


def test_help_texts_are_parsed_once(monkeypatch):
    """A run builds four parsers."""
    add_megatron_arguments(argparse.ArgumentParser())
    monkeypatch.setattr(inspect, "getsource", lambda one: pytest.fail(f"read the source of {one} again"))
    add_megatron_arguments(argparse.ArgumentParser())
    assert ArgumentGroupFactory._get_field_docstrings is core_fixes.get_field_docstrings


def test_megatrons_help_still_fails():
    """startup/parser.py escapes a lone % in its help texts."""
    with pytest.raises(ValueError, match="unsupported format character"):
        add_megatron_arguments(argparse.ArgumentParser()).format_help()


def test_repairs_change_nothing_where_transformer_engine_is(monkeypatch):
    """They ask for the very flags by which upstream chooses its own way."""
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random

    for there in (True, False):
        monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", there)
        monkeypatch.setattr(random, "HAVE_TE", there)
        assert core_fixes._has_torch_adam(argparse.Namespace()) is not there
        assert core_fixes._lacks_transformer_engine(argparse.Namespace()) is not there


def test_a_save_before_the_first_step_of_the_optimizer(tmp_path):
    """The loss scale of fp16 skips it; the run used to end with an assertion of Megatron's."""
    fp16 = ("--fp16", "--initial-loss-scale", "1e30", "--use-distributed-optimizer", "--save", str(tmp_path))
    train(1, *fp16, "--train-iters", "1", "--lr-warmup-iters", "0", "--eval-iters", "0")
    assert (tmp_path / "iter_0000001" / ".metadata").exists()


def test_a_resume_of_fp16_from_before_the_first_step_of_the_optimizer(tmp_path):
    """Without the distributed optimizer the moments used to be missing in the checkpoint."""
    fp16 = ("--fp16", "--initial-loss-scale", str(2**21), "--hysteresis", "1", "--loss-scale-window", "100")
    run = [*TINY, *fp16, "--lr-warmup-iters", "0", "--eval-iters", "0", "--save", str(tmp_path), "--save-interval", "1"]
    whole = train(1, *run, "--train-iters", "4", base=[]).losses
    steps = sorted(whole)
    assert steps and 1 < steps[0] < 4, f"the scale skips some steps, not all: {steps}"
    resumed = train(1, *run, "--train-iters", "4", "--load", str(tmp_path), "--ckpt-step", "1", base=[]).losses
    assert resumed == whole
