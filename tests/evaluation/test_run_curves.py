"""Curves of runs from event files: restarts join to one history, and what cannot be read is an error."""

from pathlib import Path

import numpy as np
import pytest
from support.event_files import TRANSFORMER, losses, write

from yoco_megatron.costs.flops import train_flops
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.evaluation.run_curves import VALIDATION, read_run

SHAPE = ModelShape("transformer", "gated_retention", 2, 0, 64, 128, 2, 2, 32, 0, 0, 0, 0, 256, 32, True)


def test_what_was_abandoned_is_no_part_of_a_curve(tmp_path: Path) -> None:
    # Steps 1 to 14 with a validation each 5; a checkpoint after 8, from which the second attempt goes on.
    first = [*losses(1, 14), (VALIDATION, 5, 5.5, 5.0), (VALIDATION, 10, 10.5, 99.0)]
    second = [*losses(9, 20, value=1.0), (VALIDATION, 10, 2.5, 10.0), (VALIDATION, 20, 13.0, 20.0)]
    write(tmp_path / "tensorboard", 5000.0, second)  # on disk before the older one
    write(tmp_path / "tensorboard", 1000.0, first)
    run = read_run(tmp_path)
    assert run.curves["lm loss"].steps.tolist() == list(range(1, 21))
    expected = [1 / step + (step > 8) for step in range(1, 21)]
    np.testing.assert_allclose(run.curves["lm loss"].values, expected, rtol=1e-6)
    assert (run.curves[VALIDATION].steps.tolist(), run.curves[VALIDATION].values.tolist()) == ([5, 10, 20], [5, 10, 20])
    # Eight seconds of the first attempt, then those of the second; the time between them is nobody's.
    np.testing.assert_allclose(run.hours([8, 9, 20]) * 3600, [8, 9, 20], rtol=1e-6)
    assert run.tokens(20) == 20 * 4 * 32
    assert run.flops(20) == pytest.approx(20 * train_flops(SHAPE, 4))


def test_an_abandoned_validation_that_was_not_repeated(tmp_path: Path) -> None:
    write(tmp_path, 1000.0, [*losses(1, 14), (VALIDATION, 5, 5.5, 5.0), (VALIDATION, 12, 12.5, 99.0)])
    write(tmp_path, 2000.0, [*losses(9, 20), (VALIDATION, 20, 13.0, 20.0)])
    assert read_run(tmp_path).curves[VALIDATION].steps.tolist() == [5, 20]


def test_an_attempt_that_only_evaluates_keeps_the_training_before_it(tmp_path: Path) -> None:
    write(tmp_path, 1000.0, [*losses(1, 6), (VALIDATION, 6, 7.0, 3.0)])
    write(tmp_path, 2000.0, [(VALIDATION, 6, 1.0, 2.5)])
    run = read_run(tmp_path)
    assert run.last_step == 6
    assert run.curves[VALIDATION].values.tolist() == [2.5]


def test_the_loss_on_the_test_set_is_no_validation_loss(tmp_path: Path) -> None:
    # Megatron writes both under one tag at a run's last step, the validation set's first.
    write(tmp_path, 1000.0, [*losses(1, 4), (VALIDATION, 4, 5.0, 3.0), (VALIDATION, 4, 6.0, 8.0)])
    assert read_run(tmp_path).value(VALIDATION) == 3.0


def test_a_last_step_that_was_validated_alone(tmp_path: Path) -> None:
    # --tensorboard-log-interval 4, ten steps: the losses of steps 4 and 8, and a validation at the end.
    logged = [point for point in losses(1, 10) if point[1] in (4, 8)]
    end = [(VALIDATION, 10, 11.0, 3.0), (f"{VALIDATION} vs samples", 40, 11.0, 3.0)]
    write(tmp_path, 1000.0, [*logged, *end])
    run = read_run(tmp_path)
    assert (run.last_step, run.last_tokens) == (10, 10 * 4 * 32)
    assert run.hours(10) * 3600 == pytest.approx(11)
    assert run.training_loss() == pytest.approx(1 / 8)


def test_losses_at_equal_tokens(tmp_path: Path) -> None:
    write(tmp_path, 1000.0, [*losses(1, 100), (VALIDATION, 50, 50.5, 4.0), (VALIDATION, 100, 101.0, 2.0)])
    run = read_run(tmp_path)
    at = lambda step: step * 4 * 32.0  # noqa: E731
    assert run.training_loss() == pytest.approx(np.mean([1 / 99, 1 / 100]))  # 2% of the tokens: two steps
    assert run.training_loss(at(50)) == pytest.approx(np.mean([1 / 49, 1 / 50]))
    assert run.training_loss(at(101)) is None
    assert run.value(VALIDATION, at(75)) == pytest.approx(3.0)
    assert run.value(VALIDATION, at(49)) is None  # before the first one: nothing is known


def test_speed_is_what_the_run_logged_or_of_its_times(tmp_path: Path) -> None:
    write(tmp_path / "times", 1000.0, losses(1, 9))
    tokens, tflops = read_run(tmp_path / "times").speed()
    assert tokens == pytest.approx(4 * 32)
    assert tflops == pytest.approx(train_flops(SHAPE, 4) / 2 / 1e12)  # a step a second, on two GPUs
    write(tmp_path / "logged", 1000.0, [*losses(1, 9), ("throughput/tokens-per-second", 9, 9.0, 1234.0)])
    assert read_run(tmp_path / "logged").speed()[0] == 1234


def test_flops_of_masked_losses_are_those_that_were_counted(tmp_path: Path) -> None:
    masked = [*losses(1, 9), ("positions/computed", 9, 9.0, 0.25)]
    speed = [("throughput/tokens-per-second", 9, 9.0, 2e6), ("throughput/tflops-per-gpu", 9, 9.0, 300.0)]
    write(tmp_path / "told", 1000.0, [*masked, *speed])
    assert read_run(tmp_path / "told").flops_per_token == pytest.approx(2 * 300e12 / 2e6)  # of two GPUs
    write(tmp_path / "untold", 1000.0, masked)
    run = read_run(tmp_path / "untold")
    assert run.flops_per_token is None and "--log-throughput was not given" in run.notes[0]


def test_unknown_models_have_no_flops(tmp_path: Path) -> None:
    write(tmp_path, 1000.0, losses(1, 3), flags=TRANSFORMER | {"num_layers": None})
    run = read_run(tmp_path)
    assert run.flops_per_token is None
    assert run.speed()[1] is None
    assert "--num-layers" in run.notes[0]


def test_a_file_that_ends_in_the_middle_of_a_record(tmp_path: Path) -> None:
    path = write(tmp_path, 1000.0, losses(1, 9))
    path.write_bytes(path.read_bytes()[:-10])
    assert read_run(tmp_path).last_step == 8  # the record that was cut has the samples of step 9


def test_damage_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, 1000.0, losses(1, 9))
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_run(tmp_path)


@pytest.mark.parametrize("how", ["nothing", "missing", "no loss", "foreign"])
def test_runs_without_curves(tmp_path: Path, how: str) -> None:
    if how == "no loss":
        write(tmp_path, 1000.0, [])
    elif how == "foreign":
        write(tmp_path, 1000.0, losses(1, 3), flags={})
    expected = {
        "nothing": "holds no event file",
        "missing": "no folder of a run",
        "no loss": "no training loss",
        "foreign": "does not tell the flags",
    }
    with pytest.raises(ValueError, match=expected[how]):
        read_run(tmp_path / "run" if how == "missing" else tmp_path)
