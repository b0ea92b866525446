"""The divergence guard's decisions, without a model."""

import math
import random
from argparse import Namespace

import pytest

from yoco_megatron.resilience import arguments
from yoco_megatron.resilience.guard import MINIMUM, Guard


def warm(guard: Guard, rng: random.Random, steps: int = 64) -> None:
    for _ in range(steps):
        assert not guard.observe(rng.gauss(1.0, 0.1))


def test_spike_is_bad_and_does_not_count_as_normal():
    guard = Guard(sigmas=8, window=64, patience=3)
    warm(guard, random.Random(1))
    before = guard.threshold()
    assert 1.3 < before < 2.5
    assert guard.observe(10.0) and guard.threshold() == before
    assert not guard.observe(1.0)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_not_finite_is_bad_from_the_first_step(norm):
    guard = Guard(sigmas=8, window=64, patience=3)
    assert math.isfinite(guard.threshold())
    assert guard.observe(norm)


def test_early_steps_are_never_spikes():
    guard = Guard(sigmas=3, window=64, patience=3)
    assert not any(guard.observe(10.0**-step) for step in range(MINIMUM))


def test_divergence_is_bad_steps_in_a_row():
    guard = Guard(sigmas=6, window=64, patience=3)
    warm(guard, random.Random(2))
    for norm, diverged in [(50.0, False), (50.0, False), (1.0, False), (50.0, False), (50.0, False), (50.0, True)]:
        guard.observe(norm)
        assert guard.diverged is diverged


def test_norms_that_hardly_vary_leave_room():
    guard = Guard(sigmas=6, window=64, patience=3)
    for _ in range(64):
        guard.observe(1.0)
    assert guard.threshold() == pytest.approx(1.3)


def test_slow_growth_is_followed():
    guard = Guard(sigmas=6, window=32, patience=3)
    assert not any(guard.observe(1.01**step) for step in range(500))


def test_resumed_guard_decides_the_same():
    guard, resumed = (Guard(sigmas=6, window=32, patience=3) for _ in range(2))
    warm(guard, random.Random(3))
    guard.observe(99.0)
    resumed.load_state(guard.state())
    assert resumed.threshold() == guard.threshold() and resumed.bad_in_a_row == 1


def test_gradients_of_zero_say_nothing():
    guard = Guard(sigmas=6, window=8, patience=3)
    assert not any(guard.observe(0.0) for _ in range(20))
    assert not any(guard.observe(1.0) for _ in range(20))
    guard.observe(50.0)
    guard.observe(0.0)
    assert guard.bad_in_a_row == 1 and guard.threshold() == pytest.approx(1.3)


@pytest.mark.parametrize("norms", [[1.0] * 16, [3e38] * 16], ids=["of one", "of the largest fp32 numbers"])
def test_threshold_is_finite_whatever_sigmas_is(norms):
    guard = Guard(sigmas=1e308, window=16, patience=3)
    for norm in norms:
        guard.observe(norm)
    assert guard.observe(math.inf), "Megatron ignores a threshold of infinity"


def test_state_with_nonsense_leaves_it_out():
    guard = Guard(sigmas=6, window=32, patience=3)
    guard.load_state({"norms": [math.nan, 0.0, 1.0], "bad_in_a_row": 0})
    assert list(guard.norms) == [1.0]


@pytest.mark.parametrize("flags", [{"guard_sigmas": 0}, {"guard_sigmas": math.nan}, {"guard_window": 4}], ids=str)
def test_flags_that_give_no_threshold(flags):
    good = dict(keep_checkpoints=None, keep_every=None, guard_sigmas=6, guard_window=8, guard_patience=3)
    args = Namespace(**good | flags, hang_timeout=None, save_retain_interval=None, run_folder="run")
    with pytest.raises(ValueError, match=next(iter(flags)).replace("_", "-")):
        arguments.check(args)
