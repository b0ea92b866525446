"""The lines that Megatron prints for steps: their loss is the mean of the steps that they stand for.

A resumed run prints what the undisturbed one would: the sums since the last line are part of a checkpoint.
"""

import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
import torch.distributed as dist
from megatron.training import get_args, get_timers

from yoco_megatron import runtime
from yoco_megatron.upstream import checkpointing, log_lines, quiet, step_positions, throughput
from yoco_megatron.upstream.registry import relies_on, replaces
from yoco_megatron.utils.small_files import read_json

INTERVAL_STATE = "log_interval.json"
ADVANCED, SKIPPED, NAN = "advanced iterations", "skipped iterations", "nan iterations"


class Interval(TypedDict):
    """What has been summed up since the last line."""

    log_interval: int
    seconds: float
    counts: dict[str, int]
    losses: dict[str, float]
    positions: NotRequired[list[tuple[int, int, int, int]]]
    """By data-parallel rank; see step_positions.py."""


_totals: dict[str, Any] = {}
"""Megatron's own sums: it passes the same dict at each step of a run."""
_resumed: tuple[int, Interval] | None = None
"""Iteration and interval of the checkpoint that was loaded, until the first step after it."""


def _state() -> str:
    """The interval so far, as the process has it that prints the lines; called on all processes as a save begins."""
    counts = {name: _totals.get(name, 0) for name in (ADVANCED, SKIPPED, NAN)}
    losses = {name: total.item() for name, total in _totals.items() if name not in counts}
    state = Interval(
        log_interval=get_args().log_interval,
        seconds=get_timers()("interval-time").elapsed(reset=False),
        counts=counts,
        losses=losses,
        positions=step_positions.state(),
    )
    shared = [json.dumps(state)]
    dist.broadcast_object_list(shared, src=dist.get_world_size() - 1)
    return shared[0]


def _load(checkpoint: Path) -> None:
    global _resumed
    _totals.clear()
    interval = read_json(checkpoint / INTERVAL_STATE, Interval, missing=None)
    _resumed = interval and (int(checkpoint.name.removeprefix("iter_")), interval)


checkpointing.extra_files[INTERVAL_STATE] = _state
checkpointing.after_load.append(_load)
relies_on(
    "megatron.core.timers",
    "Timer",
    digest="079e7fb98e805b31",
    used_by="upstream/step_log.py",
    why="set_elapsed, of the timer that runs since the last line, adds what a checkpoint had of the interval",
)


def _resume(totals: dict[str, Any], iteration: int, interval: Interval) -> None:
    """Go on with the interval of a checkpoint, if its next line stands for the same steps."""
    args, saved = get_args(), interval.get("positions", [])
    if (iteration, interval["log_interval"]) != (args.iteration, args.log_interval):
        return
    if not step_positions.fits(args, saved):
        return
    step_positions.resume(saved)
    totals |= interval["counts"]
    for name, loss in interval["losses"].items():
        totals[name] = torch.tensor([loss], dtype=torch.float, device=runtime.device())
    get_timers()("interval-time").set_elapsed(interval["seconds"])


@replaces(
    "megatron.training.training",
    "training_log",
    digest="3202f03b11196793",
    calls=1,
    why="the line of an attempt's second step has the mean of two, that of skipped steps alone a loss of 0, and one "
    "of which a batch has no loss none at all",
)
def training_log(
    losses: dict[str, torch.Tensor],
    totals: dict[str, Any],
    rate: float | None,
    iteration: int,
    loss_scale: float,
    report_memory: bool,
    skipped: int,
    norm: float | None,
    *rest: Any,
    is_first_iteration: bool = False,
    **kwargs: Any,
) -> bool:
    """Megatron's; see the module. A step without a position that has a loss is told, and logged as a skipped one."""
    global _totals, _resumed
    _totals = totals
    args = get_args()
    if _resumed is not None:
        _resume(totals, *_resumed)
        _resumed = None
    step_positions.add_step()
    prints = dist.get_rank() == dist.get_world_size() - 1
    if norm == 0 and any(loss.isnan() for loss in losses.values()):
        if prints:
            print(f"step {iteration}: no position with a loss: all loss masks of its samples are zero", flush=True)
        losses, skipped = {}, 1
    if skipped and not totals.get(ADVANCED):
        for name in totals.keys() - {ADVANCED, SKIPPED, NAN}:
            del totals[name]  # it would be printed as 0
    regular = iteration % args.log_interval == 0
    quiet.training_begins()
    if regular or is_first_iteration:
        rates = throughput.measure(iteration, totals.get(ADVANCED, 0) + totals.get(SKIPPED, 0) + 1)
        log_lines.rates = rates
        if prints and regular:
            throughput.write(rates, iteration)
    # An attempt's first step has a line in any case, and counts in the next line as well: not where its own was due.
    first = is_first_iteration and not regular
    result = training_log.original(
        losses,
        totals,
        rate,
        iteration,
        loss_scale,
        report_memory,
        skipped,
        norm,
        *rest,
        is_first_iteration=first,
        **kwargs,
    )
    if regular:
        step_positions.start_line()
    return result
