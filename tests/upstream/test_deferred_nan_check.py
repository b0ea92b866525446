"""Results that are checked at the end of a step are checked as Megatron does at once."""

import math

import pytest
import torch
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunMode,
    RerunStateMachine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)

from yoco_megatron.upstream.deferred_nan_check import deferred_result_checks

pytestmark = pytest.mark.usefixtures("one_process")
RULES = dict(rejection_func=torch.isnan, message="found NaN", tolerance=0.0, fatal=True)


@pytest.fixture(params=[RerunMode.DISABLED, RerunMode.VALIDATE_RESULTS])
def machine(request: pytest.FixtureRequest) -> RerunStateMachine:
    initialize_rerun_state_machine(mode=request.param)
    return get_rerun_state_machine()


def steps(machine: RerunStateMachine, results: list[list[float]], reruns: list[list[float]] | None = None) -> None:
    """Steps whose checks see these results; the last one's reruns see others."""
    data = RerunDataIterator(iter(range(100)))
    for number, step in enumerate(results):
        again = iter(reruns or [])
        while machine.should_run_forward_backward(data):
            with deferred_result_checks():
                for result in step:
                    tensor = torch.tensor(result)
                    machine.validate_result(result=tensor, **RULES)
                    tensor /= 2  # as Megatron's schedules do with the loss
            if number == len(results) - 1 and reruns:
                step = next(again, step)
        machine.should_checkpoint_and_exit()


def test_good_results_pass(machine: RerunStateMachine) -> None:
    steps(machine, [[1.0, math.inf], [2.0, 3.0]])


def test_a_bad_result_is_found(machine: RerunStateMachine, caplog: pytest.LogCaptureFixture) -> None:
    if machine.mode == RerunMode.DISABLED:
        with pytest.raises(RuntimeError, match=r"Unexpected result nan \(message='found NaN'\)"):
            steps(machine, [[1.0], [2.0, math.nan, 4.0]])
        return
    steps(machine, [[1.0], [2.0, math.nan, 4.0]], reruns=[[2.0, 3.0, 4.0]])
    assert "invocation #2" in caplog.text and "not reproducible" in caplog.text


def test_results_wait_until_the_end(machine: RerunStateMachine) -> None:
    seen: list[float] = []
    rules = RULES | dict(rejection_func=lambda result: seen.append(result.item()))
    machine.first_iteration_complete = True
    assert machine.should_run_forward_backward(RerunDataIterator(iter([1])))
    with deferred_result_checks():
        for value in (1.5, 2.5):
            result = torch.tensor(value)
            machine.validate_result(result=result, **rules)
            result.zero_()
        assert seen == []
    assert seen == [1.5, 2.5]


def test_an_exception_is_not_hidden_by_the_checks(machine: RerunStateMachine) -> None:
    @deferred_result_checks()
    def fail() -> None:
        machine.validate_result(result=torch.tensor(math.nan), **RULES)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert machine.validate_result.__func__ is RerunStateMachine.validate_result
