"""A checkpoint holds the state of its optimizer and its schedule (megatron/core/optimizer_param_scheduler.py), which a
resumed run goes on with."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from yoco_megatron.checkpoint import layout as checkpoints
from yoco_megatron.checkpoint.common_state import common_state
from yoco_megatron.config.rules import MATRIX_OPTIMIZERS
from yoco_megatron.costs.optimizer import is_distributed
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.small_files import BadFile

NEW_ONE = "--no-load-optim, which starts with a new one, and with the learning rate of step 0"


def check_resumable(args: Namespace) -> None:
    """Compare optimizer and schedule of the flags with those of the checkpoint that --load will take. On the first rank
    alone.

    Raises:
        ValueError: another optimizer; everything of the schedule that differs and that Megatron would refuse, with both
            values; no schedule in it.
    """
    if args.load is None or args.finetune or args.no_load_optim or args.skip_train or args.rank:
        return
    saved = _saved(args)
    if saved is None:
        return
    require(
        "opt_param_scheduler" in saved,
        f"--load {args.load}: the checkpoint of iteration {saved['iteration']} was saved without its optimizer: add "
        + NEW_ONE,
    )
    _check_optimizer(saved["args"], args)
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    before, now = _by_flag(saved["opt_param_scheduler"], saved["args"]), _by_flag(_scheduler_of(args), args)
    different = [name for name in now if name in before and now[name] != before[name]]
    if not different:
        return
    told = "; ".join(f"{name} was {before[name]}, is {now[name]}" for name in different)
    raise ValueError(
        f"--load {args.load} was trained on another schedule: {told}. Give the same flags; "
        "--use-checkpoint-opt_param-scheduler for the checkpoint's, --override-opt_param-scheduler for this one; or "
        f"start a new stage from its weights: --pretrained-checkpoint {args.load}, and a new folder for --load, --save"
    )


def _check_optimizer(saved: Namespace, args: Namespace) -> None:
    for flag, before, now in (
        ("--optimizer", saved.optimizer, args.optimizer),
        ("--muon-scalar-optimizer", saved.muon_scalar_optimizer, args.muon_scalar_optimizer),
    ):
        require(
            before == now,
            f"--load {args.load} was trained with {flag} {before}, whose state {flag} {now} cannot use: give the same; "
            f"or add {NEW_ONE}",
        )
    was, now = _of_divided_experts(saved), _of_divided_experts(args)
    require(
        args.optimizer not in MATRIX_OPTIMIZERS or was == now,
        f"--load {args.load} was trained with {was}, and this run has {now}: --optimizer {args.optimizer} needs the "
        f"same; or add {NEW_ONE}",
    )


def _of_divided_experts(args: Namespace) -> str:
    """What Megatron makes an optimizer of its own for, beside that of other weights."""
    tp = args.tensor_model_parallel_size
    if not args.num_experts or (args.expert_model_parallel_size, args.expert_tensor_parallel_size or tp) == (1, tp):
        return "no experts divided over ranks (--expert-model-parallel-size, --expert-tensor-parallel-size)"
    return f"experts divided over ranks, {'with' if is_distributed(args) else 'without'} --use-distributed-optimizer"


def _saved(args: Namespace) -> dict[str, Any] | None:
    """The common state of the checkpoint; None where there is none, as of released weights."""
    load, tracked = Path(args.load), checkpoints.tracked_iteration(Path(args.load))
    if args.ckpt_format != "torch_dist":
        return None
    if args.ckpt_step:
        candidates = [args.ckpt_step]
    elif tracked is not None:
        candidates = [tracked, *(iteration for iteration in checkpoints.iterations(load) if iteration < tracked)]
    else:  # with a tracker that a crash cut short, the newest is loaded
        candidates = [] if checkpoints.tracked(load) else checkpoints.iterations(load)
    for iteration in candidates:
        try:
            return common_state(checkpoints.path_of(load, iteration))
        except BadFile:
            continue  # loading passes over a damaged one, too, and says what is wrong with it
    return None


def _length(args: Namespace) -> int | None:
    if args.train_samples:
        return args.train_samples
    return args.train_iters * args.global_batch_size if args.train_iters and args.global_batch_size else None


def _scheduler_of(args: Namespace) -> dict[str, Any]:
    """The state that Megatron's scheduler would have; without its lengths where the flags do not tell the batch."""
    constant = args.weight_decay_incr_style == "constant"
    found = {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_decay_style": args.lr_decay_style,
        "wd_incr_style": args.weight_decay_incr_style,
        "start_wd": args.weight_decay if constant else args.start_weight_decay,
        "end_wd": args.weight_decay if constant else args.end_weight_decay,
    }
    length = _length(args)
    if length is None:
        return found
    if args.train_samples:
        decay, warmup = args.lr_decay_samples, args.lr_warmup_samples
    else:
        decay, warmup = ((steps or 0) * args.global_batch_size for steps in (args.lr_decay_iters, args.lr_warmup_iters))
    decay = decay or length
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return found | {"lr_decay_steps": decay, "lr_warmup_steps": warmup}


def _by_flag(scheduler: dict[str, Any], args: Namespace) -> dict[str, object]:
    """A schedule in a user's words; lengths in samples, as Megatron counts them, where they are known."""
    lengths = {
        "samples (--train-iters x --global-batch-size, or --train-samples)": _length(args),
        "samples of --lr-decay-*": scheduler.get("lr_decay_steps"),
        "samples of --lr-warmup-*": scheduler.get("lr_warmup_steps"),
    }
    start, end = scheduler["start_wd"], scheduler["end_wd"]
    constant = scheduler["wd_incr_style"] == "constant"
    return {
        "--lr": scheduler["max_lr"],
        "--min-lr": scheduler["min_lr"],
        "--decoupled-lr": args.decoupled_lr,
        "--decoupled-min-lr": args.decoupled_min_lr,
        "--lr-decay-style": scheduler["lr_decay_style"],
        "--weight-decay-incr-style": scheduler["wd_incr_style"],
        **({"--weight-decay": end} if constant else {"--start-weight-decay": start, "--end-weight-decay": end}),
        **{name: value for name, value in lengths.items() if value is not None},
    }
