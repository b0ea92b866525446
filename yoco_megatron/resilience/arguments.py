"""The flags of this package, their checks, and what they imply for Megatron's flags."""

import argparse
import math
from pathlib import Path

from yoco_megatron.resilience.guard import LEAST_WINDOW
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.small_files import read_json

SKIPPED = "skipped_iterations.json"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the group "resilience"."""
    group = parser.add_argument_group("resilience", "docs/resilience.md")
    group.add_argument(
        "--run-folder",
        metavar="DIR",
        help="Keep everything of the run there: implies --save and --load DIR/checkpoints, --tensorboard-dir "
        "DIR/tensorboard and --exit-signal-handler, and switches heartbeat, trigger files and records on.",
    )
    group.add_argument("--keep-checkpoints", type=int, metavar="N", help="Remove all but the newest N checkpoints.")
    group.add_argument("--keep-every", type=int, metavar="ITERATIONS", help="But keep the multiples of this.")
    group.add_argument(
        "--guard-sigmas",
        type=float,
        metavar="K",
        help="Skip steps whose gradient norm is not finite, or K standard deviations above the recent mean.",
    )
    group.add_argument("--guard-window", type=int, default=128, help="Good steps that the mean is taken over.")
    group.add_argument("--guard-patience", type=int, default=8, help="Bad steps in a row before rolling back.")
    group.add_argument(
        "--hang-timeout",
        type=float,
        metavar="MINUTES",
        help="Write the Python stacks of all processes and end them when no step is made for so long.",
    )


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict each other."""
    for dest in ("keep_checkpoints", "keep_every", "guard_sigmas", "guard_window", "guard_patience", "hang_timeout"):
        value = getattr(args, dest)
        good = value is None or (value > 0 and math.isfinite(value))
        require(good, f"--{dest.replace('_', '-')} {value} must be a positive number")
    require(
        args.guard_window >= LEAST_WINDOW,
        f"--guard-window {args.guard_window} must be at least {LEAST_WINDOW}: fewer do not show how norms vary",
    )
    require(
        not (args.keep_checkpoints and args.save_retain_interval),
        "--keep-checkpoints and --save-retain-interval both remove checkpoints: use one (--keep-every is the latter)",
    )
    require(args.keep_checkpoints or not args.keep_every, "--keep-every has no effect without --keep-checkpoints")
    needs_folder = {"--hang-timeout": args.hang_timeout, "--guard-sigmas": args.guard_sigmas}
    for flag, value in needs_folder.items():
        require(value is None or args.run_folder, f"{flag} needs --run-folder, where it writes")
    if args.guard_sigmas is not None:
        require(args.clip_grad > 0 or not args.fp16, "--guard-sigmas with --fp16 needs --clip-grad above 0")
    if args.run_folder and args.save is not None:
        folder = Path(args.run_folder)
        require(
            Path(args.save) == folder / "checkpoints",
            f"--save {args.save} is not in --run-folder {folder}: remove --save, launchers look for checkpoints there",
        )


def fill_in(args: argparse.Namespace) -> None:
    """Set, in place, Megatron's flags that these imply."""
    if args.guard_sigmas is not None:
        args.check_for_nan_in_loss_and_grad = False  # it would end the run at the first NaN
    if not args.run_folder:
        return
    folder = Path(args.run_folder)
    for dest, name in (("save", "checkpoints"), ("load", "checkpoints"), ("tensorboard_dir", "tensorboard")):
        if getattr(args, dest) is None:
            setattr(args, dest, str(folder / name))
    if not args.exit_signal_handler:
        args.exit_signal_handler = True
    args.iterations_to_skip = sorted({*args.iterations_to_skip, *skipped_iterations(folder)})


def skipped_iterations(run_folder: Path) -> list[int]:
    """The iterations whose batches the guard has given up. Raises BadFile for a list that is damaged."""
    fix = "restore it, or remove it to train on these batches again"
    return read_json(run_folder / SKIPPED, list[int], missing=[], fix=fix)
