"""Whose fault a rejected result was, from what all processes say of it."""

import pytest
from megatron.core.rerun_state_machine import RerunValidationStatus as Status

from yoco_megatron.upstream.rejected_results import Rejection, divergence

SAME, OTHER = Status.FIRST_RERUN_REPRODUCIBLE, Status.FIRST_RERUN_NOT_REPRODUCIBLE
ELSEWHERE, ONLY_THERE = Status.SECOND_RERUN_REPRODUCIBLE, Status.SECOND_RERUN_NOT_REPRODUCIBLE


def saw(status: Status, finite: bool = False) -> Rejection:
    return Rejection(iteration=3, status=status, message="found NaN", finite=finite)


@pytest.mark.parametrize(
    ("everyone", "diverged"),
    [
        ([saw(SAME), saw(SAME)], True),
        ([saw(SAME)], True),
        ([saw(OTHER), saw(OTHER)], True),  # all at once: not their hardware
        ([saw(SAME), saw(OTHER)], True),
        ([saw(OTHER)], False),  # nobody else to compare with
        ([saw(SAME), None], False),
        ([None, saw(OTHER)], False),
        ([saw(SAME, finite=True), saw(SAME, finite=True)], False),  # injected
        ([None, saw(ELSEWHERE)], True),  # one replica's batch, on whatever hardware
        ([None, saw(ONLY_THERE)], False),
        ([None, None], False),  # the same hardware again: nothing was compared
    ],
)
def test_divergence(everyone, diverged):
    reason = divergence(everyone)
    assert (reason is not None) == diverged
    assert not diverged or "found NaN" in reason
