"""The length of a run and its learning rate: what Megatron finds wrong only when the model stands or is loaded.

A checkpoint holds its schedule (megatron/core/optimizer_param_scheduler.py).
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import yaml

from yoco_megatron.checkpoint.folder import RESOLVED, tracked_iteration
from yoco_megatron.config.rules import require

# What makes the schedule, by argparse destination.
LENGTHS = ("train_iters", "lr_decay_iters", "lr_warmup_iters", "lr_warmup_fraction", "global_batch_size")
SAMPLES = ("train_samples", "lr_decay_samples", "lr_warmup_samples")
VALUES = ("lr", "min_lr", "lr_decay_style", "weight_decay")


def check(args: Namespace) -> None:
    """Raises ValueError for intervals, lengths and warm-ups that Megatron would stumble over later."""
    for dest in ("log_interval", "eval_interval"):
        value = getattr(args, dest)
        require(value is None or value >= 1, f"--{dest.replace('_', '-')} {value} must be at least 1")
    require(
        not (args.train_iters and args.train_samples),
        "--train-iters and --train-samples are both set: keep one (--config ... train-iters=null unsets a recipe's)",
    )
    for unit in ("iters", "samples"):
        warmup, run = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"train_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or run
        if run and args.lr_warmup_fraction is None and not args.skip_train:
            require(
                warmup < decay,
                f"--lr-warmup-{unit} {warmup} must be below --lr-decay-{unit} {decay}, by default --train-{unit}",
            )


def check_resumable(args: Namespace, build_parser: Callable[[], ArgumentParser]) -> None:
    """Compare the schedule of the flags with that of the checkpoint in --load, told by the config beside it.

    Raises:
        ValueError: everything that differs and that Megatron would refuse, with both values.
    """
    chosen = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    if args.load is None or args.finetune or args.no_load_optim or args.skip_train or chosen:
        return
    path = Path(args.load) / RESOLVED
    # Released weights have no schedule.
    if tracked_iteration(Path(args.load)) is None or not path.exists():
        return
    was, now = _schedule(_read(path, build_parser())), _schedule(args)
    # Lengths in samples are not known of a run that did not say its batch.
    different = [name for name in now if name in was and now[name] != was[name]]
    if not different:
        return
    told = "; ".join(f"{name} was {was[name]}, is {now[name]}" for name in different)
    raise ValueError(
        f"--load {args.load} was trained on another schedule: {told}. Give the same flags; "
        "--use-checkpoint-opt_param-scheduler for the checkpoint's, --override-opt_param-scheduler for this one; or "
        f"start a new stage from its weights: --pretrained-checkpoint {args.load}, and a new folder for --load, --save"
    )


def _read(path: Path, parser: ArgumentParser) -> Namespace:
    content = yaml.safe_load(path.read_text()) or {}
    known = {dest.replace("_", "-") for dest in (*LENGTHS, *SAMPLES, *VALUES)}
    flags = [f"--{name}={value}" for name, value in content.items() if name in known]
    return parser.parse_known_args(flags)[0]


def _schedule(args: Namespace) -> dict[str, object]:
    """By flag; lengths in samples, as Megatron counts them, where the flags tell."""
    found = {f"--{dest.replace('_', '-')}": getattr(args, dest) for dest in VALUES}
    if args.train_samples:
        run, decay, warmup = (getattr(args, dest) for dest in SAMPLES)
    elif args.global_batch_size and args.train_iters:
        each = args.global_batch_size
        run, decay = args.train_iters * each, (args.lr_decay_iters or 0) * each
        warmup = args.lr_warmup_iters * each
    else:
        return found
    decay = decay or run
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    of = "(--train-iters x --global-batch-size, or --train-samples)"
    return found | {f"samples {of}": run, "samples of --lr-decay-*": decay, "samples of --lr-warmup-*": warmup}
