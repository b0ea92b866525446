"""A run with --run-folder: its records, and hooks in Megatron's loop for guard, watchdog, heartbeat and triggers."""

import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    RerunState,
    get_rerun_state_machine,
)
from megatron.training import async_utils, get_args, get_signal_handler, training

from yoco_megatron import runtime
from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.resilience import exit_record, run_folder
from yoco_megatron.resilience.arguments import SKIPPED, skipped_iterations
from yoco_megatron.resilience.exit_record import Outcome
from yoco_megatron.resilience.guard import Guard, GuardState
from yoco_megatron.resilience.records import trained_steps
from yoco_megatron.resilience.triggers import EXIT, SAVE, SIGNAL, Triggers
from yoco_megatron.resilience.watchdog import SLOW, Watchdog
from yoco_megatron.upstream import (
    checkpointing,
    rejected_results,
    step_log,  # noqa: F401 (its training_log, and what follows, must be entered before ours, which wrap them)
    training_loop,  # noqa: F401
)
from yoco_megatron.upstream.registry import relies_on, replaces
from yoco_megatron.utils.files import write_json
from yoco_megatron.utils.small_files import read_json

GUARD_STATE = "guard.json"
FAILED = EXIT_CODE_FAILED_ON_RESULT_VALIDATION
TRAINING = "megatron.training.training"


class ManagedRun:
    """The state of the hooks in one process."""

    def __init__(self, args: Namespace) -> None:
        self.folder = Path(args.run_folder)
        self.leaving: Outcome | None = None
        self.iteration = 0
        self.trained_before = self.trained = 0  # steps that changed the weights: before this attempt, and in it
        checkpointing.extra_files[checkpoints.TRAINED] = lambda: json.dumps(self.trained_before + self.trained)
        checkpointing.after_load.append(self.note_start)
        self.guard = None
        if args.guard_sigmas is not None:
            self.guard = Guard(args.guard_sigmas, args.guard_window, args.guard_patience)
            _keep_in_checkpoints(self.guard)
        self.watchdog = None
        if args.hang_timeout:
            stacks = self.folder / "stacks" / run_folder.attempt() / f"{args.rank}.txt"
            self.watchdog = Watchdog(args.hang_timeout * 60, stacks)
            self.watchdog.tick(SLOW)
        self.triggers = Triggers(self.folder) if args.rank == 0 else None
        self.last_beat: tuple[float, int] | None = None

    def note_start(self, checkpoint: Path) -> None:
        """It starts from there."""
        self.trained_before = trained_steps(checkpoint)

    def note_step(self, result: tuple, step: int) -> tuple:
        """`result` of train_step; if it ends the run, record why, and that no node is to blame where none is."""
        loss, skipped, save, leave, code, norm, *others = result
        if not leave and not skipped and norm != 0:  # a gradient of zero teaches nothing
            self.trained += 1
        spoiled = not leave and not skipped and norm is not None and not math.isfinite(norm)
        if spoiled and get_args().check_for_nan_in_loss_and_grad:
            # Megatron checks what each process has before the sum over all, and nothing in an attempt's first step.
            self.leaving = Outcome("diverged", FAILED, f"diverged in step {step}: gradient norm {norm}", step)
        elif leave and self.leaving is None:
            self.answer_rerun()
            everyone = rejected_results.gather()
            reason = rejected_results.divergence(everyone)
            if reason:
                self.leaving = Outcome("diverged", FAILED, f"diverged in step {step}: {reason}", step)
            else:
                ended = f"Megatron's rerun state machine ended the run with code {code}"
                suspect = rejected_results.is_suspect(everyone[dist.get_rank()])
                self.leaving = Outcome("hardware", code, ended, self.iteration, suspect)
        if self.leaving is None:
            return result
        if self.leaving.kind == "diverged":
            save, leave, code = False, True, self.leaving.code  # a rerun elsewhere would show nothing
            if dist.get_rank() == 0:
                print(self.leaving.reason, flush=True)
        exit_record.record(self.folder, self.leaving)
        dist.barrier()  # the first to end has the launcher kill the others: all must have written their record
        return loss, skipped, save, leave, code, norm, *others

    def answer_rerun(self) -> None:
        """If this attempt has rerun a step that another one rejected: no later attempt need do it again."""
        machine = get_rerun_state_machine()
        if machine.state == RerunState.RERUNNING_FROM_CHECKPOINT and dist.get_rank() == 0:
            rerun = checkpoints.path_of(self.folder / "checkpoints", machine.current_iteration)
            (rerun / checkpoints.ANSWERED).touch()

    def roll_back(self, guard: Guard, step: int) -> None:
        """Go back for good to the checkpoint before the bad steps, and skip all batches between it and `step`."""
        first_bad = step - guard.bad_in_a_row + 1
        with self.slowly():
            async_utils.maybe_finalize_async_save(blocking=True)  # what is being saved is chosen from, or abandoned
        checkpointing.leave_newer_behind()
        saved = [one for folder in checkpointing.folders_of_saves(get_args()) for one in checkpoints.iterations(folder)]
        back_to = max((one for one in saved if one < first_bad), default=0)
        reason = f"{guard.bad_in_a_row} bad steps in a row up to {step}: back to {back_to}, without its batches"
        self.leaving = Outcome("rolled_back", 0, reason, step)
        dist.barrier()  # nobody may still be looking for the checkpoint
        checkpointing.go_back(back_to)  # first: killed in between, the run would make the bad steps again, and go back
        if dist.get_rank() == 0:
            path = self.folder / SKIPPED
            known = skipped_iterations(self.folder)
            write_json(path, sorted({*known, *range(back_to + 1, step + 1)}))
            print(f"guard: {reason}", flush=True)

    def slowly(self) -> AbstractContextManager:
        """Context in which the watchdog allows more time."""
        return self.watchdog.slow() if self.watchdog else nullcontext()

    def beat(self, args: Namespace, iteration: int, loss: float | None) -> None:
        """Write the heartbeat. A file system in trouble does not end the run before it must save."""
        now, tokens = time.monotonic(), args.consumed_train_samples * args.seq_length
        last, self.last_beat = self.last_beat, (now, tokens)
        beat = {
            "iteration": iteration,
            "train_iters": args.train_iters,
            "tokens": tokens,
            "loss": loss if loss is not None and math.isfinite(loss) else None,
            "tokens_per_second": (tokens - last[1]) / (now - last[0]) if last else None,
            "time": time.time(),
            "attempt": run_folder.attempt(),
            "host": exit_record.host(),
            "skipped": len(args.iterations_to_skip),
            "world_size": args.world_size,
        }
        try:
            write_json(self.folder / "heartbeat.json", beat)
        except OSError as error:
            print(f"warning: no heartbeat at step {iteration}: {error}", file=sys.stderr, flush=True)

    def reason_to_leave(self, args: Namespace, requests: int, iteration: int) -> Outcome:
        if requests & EXIT:
            return Outcome("stopped", 0, "the trigger file `exit`", iteration)
        if requests & SIGNAL:
            return Outcome("requeue", 0, "a signal asked to leave", iteration)
        if args.exit_interval and iteration % args.exit_interval == 0:
            return Outcome("stopped", 0, f"--exit-interval {args.exit_interval}", iteration)
        return Outcome("requeue", 0, "--exit-duration-in-mins", iteration)

    def end(self, code: int) -> Outcome:
        """Say in the run folder how the run ended: `code` is that of Megatron's sys.exit, or 0 where it returned."""
        if self.watchdog:
            self.watchdog.stop()
        outcome = self.leaving or Outcome("crash", code, f"exit {code} in step {self.iteration}")
        exit_record.record(self.folder, outcome)
        return outcome

    def reached_end(self) -> Outcome:
        """The outcome of a run that Megatron's `pretrain` returned from."""
        args = get_args()
        if args.skip_train:
            return Outcome("stopped", 0, "--skip-train")
        if self.trained or args.iteration >= args.train_iters:
            return Outcome("finished", 0, "all of --train-iters", args.train_iters)
        reason = f"none of the steps {args.iteration + 1} to {args.train_iters} changed the weights"
        return Outcome("untrained", 1, f"{reason}: all were skipped, or had no position with a loss", args.iteration)


def _keep_in_checkpoints(guard: Guard) -> None:
    """Make the guard's state part of each checkpoint: a resumed run skips the steps that an undisturbed one skips."""

    def load(path: Path) -> None:
        state = read_json(path / GUARD_STATE, GuardState, missing=None)
        if state is not None:
            guard.load_state(state)

    checkpointing.extra_files[GUARD_STATE] = lambda: json.dumps(guard.state())
    checkpointing.after_load.append(load)


relies_on(
    "megatron.core.rerun_state_machine",
    "RerunStateMachine.should_checkpoint_and_exit",
    digest="f6e17a309cb26c45",
    used_by="upstream/resilience_hooks.py",
    why="note_exit: in which state it ends with which code",
)

_run: ManagedRun
"""This process's; `managed_run` sets it."""


def _is_managed(args: Namespace) -> bool:
    return bool(args.run_folder)


@replaces(
    TRAINING,
    "get_forward_backward_func",
    digest="f28b8cf90a8985fa",
    calls=2,
    when=_is_managed,
    why="each call of a schedule, in training and evaluation, is progress for the watchdog",
)
def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable:
    schedule = get_forward_backward_func.original(*args, **kwargs)

    def run(**call: Any) -> Any:
        result = schedule(**call)
        if _run.watchdog:
            _run.watchdog.tick()
        return result

    return run


@replaces(
    TRAINING,
    "save_checkpoint_and_time",
    digest="0b0810e17195d9a2",
    when=_is_managed,
    why="the watchdog allows more time for a save; the trigger file `save` calls it",
)
def save_checkpoint_and_time(*args: Any, **kwargs: Any) -> None:
    with _run.slowly():
        save_checkpoint_and_time.original(*args, **kwargs)


@replaces(
    TRAINING,
    "maybe_finalize_async_save",
    digest="4f63fdb80d6167f8",
    calls=3,
    when=_is_managed,
    why="the watchdog allows more time for the last save",
)
def maybe_finalize_async_save(blocking: bool = False, terminate: bool = False) -> None:
    with _run.slowly() if blocking else nullcontext():
        maybe_finalize_async_save.original(blocking, terminate)


relies_on(
    "megatron.core.optimizer.optimizer",
    "ChainedOptimizer.step",
    digest="f723f020ea4e32d5",
    used_by="upstream/resilience_hooks.py",
    why="train_step: it skips an update whose gradient norm is above its config's grad_norm_skip_threshold, if finite",
)


def _replace_nan(module: str, optimizer: str, digest: str) -> None:
    @replaces(
        module,
        f"{optimizer}.get_grad_norm",
        digest=digest,
        when=lambda args: _is_managed(args) and args.guard_sigmas is not None,
        why="no comparison with NaN is true: as infinity it is above the guard's threshold",
    )
    def get_grad_norm(self) -> float:
        norm = get_grad_norm.original(self)
        return math.inf if math.isnan(norm) else norm


_replace_nan("megatron.core.optimizer.optimizer", "ChainedOptimizer", digest="fa0e04d3c439685c")
_replace_nan("megatron.core.optimizer.layer_wise_optimizer", "LayerWiseDistributedOptimizer", digest="ab5b07238ea0adf8")


@replaces(
    TRAINING,
    "train_step",
    digest="27da8956fe41e571",
    calls=1,
    when=_is_managed,
    why="the guard needs a step's gradient norm, and why a step ends the run has to be recorded",
)
def train_step(forward_step: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **kwargs: Any) -> tuple:
    """One step; with the guard, one whose update is skipped if its gradient is bad."""
    run, guard = _run, _run.guard
    step = kwargs["iteration"] + 1
    if guard is None:
        return run.note_step(train_step.original(forward_step, data, model, optimizer, *rest, **kwargs), step)
    threshold = guard.threshold()
    for one in optimizer.chained_optimizers:
        one.config.grad_norm_skip_threshold = threshold
    result = train_step.original(forward_step, data, model, optimizer, *rest, **kwargs)
    loss, skipped, save, leave, code, norm, *others = result
    if norm is not None and not leave and guard.observe(norm):
        if dist.get_rank() == 0:
            print(f"guard: step {step} skipped, gradient norm {norm:.4g} above {threshold:.4g}", flush=True)
        if guard.diverged:
            run.roll_back(guard, step)
            save, leave, code = False, True, 0
    return run.note_step((loss, skipped, save, leave, code, norm, *others), step)


relies_on(
    "megatron.training.dist_signal_handler",
    "DistributedSignalHandler.signals_received",
    digest="4885ae00eac5fe5d",
    used_by="upstream/resilience_hooks.py",
    why="checkpoint_and_decide_exit reads and sets `_signal_received`, and replaces this method for one call",
)


@replaces(
    TRAINING,
    "checkpoint_and_decide_exit",
    digest="e65e7d2bd8e20f86",
    calls=1,
    when=_is_managed,
    why="trigger files ask for a save or the end; it asks `signals_received` once, first",
)
def checkpoint_and_decide_exit(
    model: Any, optimizer: Any, scheduler: Any, iteration: int, flops: float, context: Any, data: Any
) -> bool:
    """Megatron's, and what trigger files ask for; all processes agree on both at once."""
    run, args, handler = _run, get_args(), get_signal_handler()
    run.iteration = iteration
    if run.triggers and (asked := run.triggers.poll()):
        handler._signal_received = int(handler._signal_received) | asked
    requests = _largest(int(handler._signal_received))
    handler._signal_received = int(handler._signal_received) & ~SAVE
    leaving = bool(requests & (SIGNAL | EXIT))
    regular = args.save_interval and iteration % args.save_interval == 0
    if requests & SAVE and not regular and not leaving:
        training.save_checkpoint_and_time(
            iteration, model, optimizer, scheduler, flops, context, train_data_iterator=data
        )
    with mock.patch.object(handler, "signals_received", return_value=[leaving]):
        leaves = checkpoint_and_decide_exit.original(model, optimizer, scheduler, iteration, flops, context, data)
    if leaves:
        run.leaving = run.reason_to_leave(args, requests, iteration)
    if run.triggers:
        run.triggers.done(leaves)
    return leaves


def _largest(flags: int) -> int:
    """The largest value of any process, in place of Megatron's all-gather, which reads each process's one by one.

    A signal elsewhere that a larger request of the first process hides is still there at the next step.
    """
    largest = torch.tensor(flags, dtype=torch.int32, device=runtime.device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


@replaces(
    TRAINING,
    "training_log",
    digest="3202f03b11196793",
    calls=1,
    when=_is_managed,
    why="each of its lines is a heartbeat",
)
def training_log(losses: dict, totals: dict, rate: Any, iteration: int, *rest: Any, **kwargs: Any) -> Any:
    """Megatron's, and at each of its lines the heartbeat, by the process that knows the loss."""
    result = training_log.original(losses, totals, rate, iteration, *rest, **kwargs)
    args = get_args()
    if iteration % args.log_interval == 0 and dist.get_rank() == dist.get_world_size() - 1:
        _run.beat(args, iteration, losses["lm loss"].item() if "lm loss" in losses else None)
    return result


@contextmanager
def managed_run(args: Namespace) -> Iterator[None]:
    """Around `pretrain()`, after `upstream.install`: records, hooks' state and exit record of a run with --run-folder.

    Does nothing for a run without one.
    """
    global _run
    if not _is_managed(args):
        yield
        return
    if args.rank == 0:
        run_folder.write_records(Path(args.run_folder), sys.argv, yaml.safe_dump(args.resolved_config, sort_keys=True))
    _run = run = ManagedRun(args)
    try:
        yield
    except SystemExit as left:  # Megatron's way to end before --train-iters
        run.end(left.code if isinstance(left.code, int) else int(left.code is not None))
        raise
    except ValueError as error:
        if run.iteration:
            raise RuntimeError(f"after iteration {run.iteration}: {error}") from error  # no user's mistake any more
        raise
    run.leaving = run.reached_end()
    outcome = run.end(0)
    if outcome.code:
        print(f"pretrain_yoco.py: error: {outcome.reason}", file=sys.stderr)
        sys.exit(outcome.code)
