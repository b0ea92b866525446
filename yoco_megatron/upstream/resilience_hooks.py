"""Hooks into Megatron's loop, `megatron/training/training.py`, for a run with --run-folder.

Replaced by name there: train_step (guard, watchdog), training_log (heartbeat), checkpoint_and_decide_exit (trigger
files, why the run leaves), get_forward_backward_func and save_checkpoint_and_time (watchdog).
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
from megatron.training import get_args, get_signal_handler, training

from yoco_megatron import runtime
from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.resilience import exit_record, run_folder
from yoco_megatron.resilience.arguments import SKIPPED
from yoco_megatron.resilience.exit_record import Outcome
from yoco_megatron.resilience.guard import Guard, prepare
from yoco_megatron.resilience.triggers import EXIT, SAVE, SIGNAL, Triggers
from yoco_megatron.resilience.watchdog import SLOW, Watchdog
from yoco_megatron.upstream import checkpointing
from yoco_megatron.utils.files import write_json

GUARD_STATE = "guard.json"


class Loop:
    """The state of the hooks in one process, and the hooks themselves."""

    def __init__(self, args: Namespace) -> None:
        self.folder = Path(args.run_folder)
        self.leaving: Outcome | None = None
        self.iteration = 0
        self.guard = None
        if args.guard_sigmas is not None:
            self.guard = Guard(args.guard_sigmas, args.guard_window, args.guard_patience)
            checkpointing.extra_files[GUARD_STATE] = self._guard_state
            checkpointing.after_load.append(self._load_guard)
        self.watchdog = None
        if args.hang_timeout:
            stacks = self.folder / "stacks" / run_folder.attempt() / f"{args.rank}.txt"
            self.watchdog = Watchdog(args.hang_timeout * 60, stacks)
            self.watchdog.tick(SLOW)
        self.triggers = Triggers(self.folder) if args.rank == 0 else None
        self.last_beat: tuple[float, int] | None = None

    def install(self) -> None:
        """Put the hooks in place of Megatron's functions, which they call."""
        for name in (
            "train_step",
            "training_log",
            "checkpoint_and_decide_exit",
            "get_forward_backward_func",
            "save_checkpoint_and_time",
        ):
            setattr(self, f"_{name}", getattr(training, name))
            setattr(training, name, getattr(self, name))

    # The guard's state is part of a checkpoint, so that a resumed run skips the steps that the undisturbed one skips.

    def _guard_state(self) -> str:
        return json.dumps(self.guard.state())

    def _load_guard(self, path: Path) -> None:
        if (path / GUARD_STATE).exists():
            self.guard.load_state(json.loads((path / GUARD_STATE).read_text()))

    def get_forward_backward_func(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's schedule, each call of which, in training and evaluation, is progress."""
        schedule = self._get_forward_backward_func(*args, **kwargs)

        def run(**call: Any) -> Any:
            result = schedule(**call)
            if self.watchdog:
                self.watchdog.tick()
            return result

        return run

    def save_checkpoint_and_time(self, *args: Any, **kwargs: Any) -> None:
        with self.watchdog.slow() if self.watchdog else nullcontext():
            self._save_checkpoint_and_time(*args, **kwargs)

    def train_step(self, forward_step: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **kwargs: Any) -> tuple:
        """One step; with the guard, one whose update is skipped if its gradient is bad."""
        if self.guard is None:
            return self._note_exit(self._train_step(forward_step, data, model, optimizer, *rest, **kwargs))
        threshold = self.guard.threshold()
        prepare(optimizer, threshold)
        result = self._train_step(forward_step, data, model, optimizer, *rest, **kwargs)
        loss, skipped, save, leave, code, norm, *others = result
        if norm is not None and not leave and self.guard.observe(norm):
            step = kwargs["iteration"] + 1
            if dist.get_rank() == 0:
                print(f"guard: step {step} skipped, gradient norm {norm:.4g} above {threshold:.4g}", flush=True)
            if self.guard.diverged:
                self._roll_back(step)
                save, leave, code = False, True, 0
        return self._note_exit((loss, skipped, save, leave, code, norm, *others))

    def _note_exit(self, result: tuple) -> tuple:
        """The rerun state machine ends a run through train_step."""
        _, _, _, leave, code, *_ = result
        if leave and self.leaving is None:
            machine = get_rerun_state_machine()
            # This process's result was refused, and no other GPU has confirmed it yet.
            suspect = machine.failed_validation_call is not None
            suspect &= code == exit_record.RERUN_TO_DISAMBIGUATE or machine.suspicious_node is None
            reason = f"Megatron's rerun state machine ended the run with code {code}"
            self.leaving = Outcome("hardware", code, reason, self.iteration, suspect)
            if machine.state == RerunState.RERUNNING_FROM_CHECKPOINT and dist.get_rank() == 0:
                rerun = checkpoints.path_of(self.folder / "checkpoints", machine.current_iteration)
                (rerun / checkpoints.ANSWERED).touch()
            exit_record.record(self.folder, self.leaving)
            dist.barrier()  # the first to end has the launcher kill the others; all shall have had their word
        return result

    def _roll_back(self, step: int) -> None:
        """Choose the checkpoint before the bad steps, and leave out all batches between it and `step`."""
        first_bad = step - self.guard.bad_in_a_row + 1
        folder = self.folder / "checkpoints"
        older = [one for one in checkpoints.iterations(folder) if one < first_bad]
        back_to = older[0] if older else 0
        reason = f"{self.guard.bad_in_a_row} bad steps in a row up to {step}: back to {back_to}, without its batches"
        self.leaving = Outcome("rolled_back", 0, reason, step)
        dist.barrier()  # nobody may still be looking for the checkpoint
        if dist.get_rank() == 0:
            path = self.folder / SKIPPED
            known = json.loads(path.read_text()) if path.exists() else []
            write_json(path, sorted({*known, *range(back_to + 1, step + 1)}))
            if older:
                checkpoints.write_tracker(folder, back_to)
            else:
                (folder / checkpoints.TRACKER).unlink(missing_ok=True)
            print(f"guard: {reason}", flush=True)

    def checkpoint_and_decide_exit(
        self, model: Any, optimizer: Any, scheduler: Any, iteration: int, flops: float, context: Any, data: Any
    ) -> bool:
        """Megatron's, and what trigger files ask for; all processes agree on both at once."""
        args, handler = get_args(), get_signal_handler()
        self.iteration = iteration
        if self.triggers and (asked := self.triggers.poll()):
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
            leaves = self._checkpoint_and_decide_exit(model, optimizer, scheduler, iteration, flops, context, data)
        if leaves:
            self.leaving = self._why(args, requests, iteration)
        if self.triggers:
            self.triggers.done(leaves)
        return leaves

    def _why(self, args: Namespace, requests: int, iteration: int) -> Outcome:
        if requests & EXIT:
            return Outcome("stopped", 0, "the trigger file `exit`", iteration)
        if requests & SIGNAL:
            return Outcome("requeue", 0, "a signal asked to leave", iteration)
        if args.exit_interval and iteration % args.exit_interval == 0:
            return Outcome("stopped", 0, f"--exit-interval {args.exit_interval}", iteration)
        return Outcome("requeue", 0, "--exit-duration-in-mins", iteration)

    def training_log(self, losses: dict, totals: dict, rate: Any, iteration: int, *rest: Any, **kw: Any) -> Any:
        """Megatron's, and at each of its lines the heartbeat, by the process that knows the loss."""
        result = self._training_log(losses, totals, rate, iteration, *rest, **kw)
        args = get_args()
        if iteration % args.log_interval == 0 and dist.get_rank() == dist.get_world_size() - 1:
            now, tokens = time.time(), args.consumed_train_samples * args.seq_length
            speed = (tokens - self.last_beat[1]) / (now - self.last_beat[0]) if self.last_beat else None
            self.last_beat = now, tokens
            loss = losses["lm loss"].item() if "lm loss" in losses else None
            beat = {"iteration": iteration, "train_iters": args.train_iters, "tokens": tokens, "loss": loss}
            beat |= {
                "tokens_per_second": speed,
                "time": now,
                "attempt": run_folder.attempt(),
                "host": exit_record.host(),
            }
            beat |= {"skipped": len(args.iterations_to_skip), "world_size": args.world_size}
            write_json(self.folder / "heartbeat.json", beat)
        return result

    def end(self, code: int) -> None:
        """Say in the run folder how the run ended: `code` is that of Megatron's sys.exit, or 0 where it returned."""
        if self.watchdog:
            self.watchdog.stop()
        default = Outcome("finished", 0, "all of --train-iters", get_args().train_iters)
        exit_record.record(
            self.folder, self.leaving or (default if code == 0 else Outcome("crash", code, f"exit {code}"))
        )


def _largest(flags: int) -> int:
    """The largest value of any process, in place of Megatron's all-gather, which reads each process's one by one.

    A signal elsewhere that a larger request of the first process hides is still there at the next step.
    """
    largest = torch.tensor(flags, dtype=torch.int32, device=runtime.device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


@contextmanager
def run_folder_kept(args: Namespace) -> Iterator[None]:
    """Around `pretrain()`: records, hooks and the last word of a run with --run-folder; nothing for one without."""
    if not args.run_folder:
        yield
        return
    if args.rank == 0:
        run_folder.write_records(Path(args.run_folder), sys.argv, yaml.safe_dump(args.resolved_config, sort_keys=True))
    loop = Loop(args)
    loop.install()
    try:
        yield
    except SystemExit as left:  # Megatron's way to end before --train-iters
        loop.end(int(left.code or 0))
        raise
    except ValueError as error:
        if loop.iteration:
            raise RuntimeError(f"after iteration {loop.iteration}: {error}") from error  # no user's mistake any more
        raise
    loop.end(0)
