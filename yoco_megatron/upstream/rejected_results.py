"""Whose fault a rejected result was, where Megatron's rerun state machine ends a run.

Each process runs a step again whose loss or gradient is NaN or Inf, and takes the result for its own hardware's if it
comes again. But where every process has rejected the step, as when the loss diverges, no node is to blame.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.rerun_state_machine import RerunValidationStatus, get_rerun_state_machine

from yoco_megatron.upstream.registry import replaces

MACHINE = "megatron.core.rerun_state_machine"
OTHER_VALUE = RerunValidationStatus.FIRST_RERUN_NOT_REPRODUCIBLE
SAME_ELSEWHERE = RerunValidationStatus.SECOND_RERUN_REPRODUCIBLE
DIFFERENT_ELSEWHERE = RerunValidationStatus.SECOND_RERUN_NOT_REPRODUCIBLE


@dataclass(frozen=True)
class Rejection:
    """What one process last said about a result that it rejected."""

    iteration: int
    status: RerunValidationStatus
    message: str
    finite: bool
    """Whether the rejected result was a number, as injected errors are."""


_last: Rejection | None = None
"""This process's."""


@replaces(
    MACHINE,
    "RerunStateMachine._log_validation_error_to_file",
    digest="fce16d5c0f6b7cf8",
    when=lambda args: bool(args.run_folder),
    why="only here the machine says how the result of a rerun compared",
)
def note_rejection(self: Any, status: RerunValidationStatus, result: Any, message: str) -> None:
    global _last
    first = result if self.initial_result is None else self.initial_result
    _last = Rejection(self.current_iteration, status, message, math.isfinite(float(first)))
    note_rejection.original(self, status=status, result=result, message=message)


def gather() -> list[Rejection | None]:
    """Every process's rejection in this step, by rank; None of one that rejected nothing. Collective."""
    now = get_rerun_state_machine().current_iteration
    mine = _last if _last and _last.iteration == now else None
    everyone: list[Rejection | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def divergence(everyone: list[Rejection | None]) -> str | None:
    """Why the step's result is the model's or the data's, or None where it is some hardware's."""
    rejections = [one for one in everyone if one is not None]
    statuses = {one.status for one in rejections}
    if SAME_ELSEWHERE in statuses and DIFFERENT_ELSEWHERE not in statuses:
        return f"{rejections[0].message}, and again on other hardware"
    if len(rejections) < len(everyone) or any(one.finite for one in rejections):
        return None
    if statuses == {OTHER_VALUE} and len(everyone) == 1:
        return None  # another result on the same hardware, and no peer that saw the same
    return f"{rejections[0].message}, on every rank" + ("" if OTHER_VALUE in statuses else " and in a rerun as well")


def is_suspect(mine: Rejection | None) -> bool:
    """Whether this process's hardware may have computed the wrong result for which the run ends."""
    if mine is None:
        return get_rerun_state_machine().restart_again_requested  # it is the same hardware again
    # After a rerun on other hardware, the fault was that of the hardware before, or nobody's.
    return mine.status not in (SAME_ELSEWHERE, DIFFERENT_ELSEWHERE)
