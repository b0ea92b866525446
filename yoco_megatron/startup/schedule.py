"""The length of a run, its rates and batches: what Megatron finds wrong once the model is built, or later."""

from argparse import Namespace
from pathlib import Path

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from yoco_megatron.parallel.pipeline.layout import sequences_at_a_time
from yoco_megatron.utils.errors import require


def check(args: Namespace) -> None:
    """Raises ValueError for lengths, rates and batches that contradict each other."""
    require(
        not (args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler),
        "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler are both set: keep one",
    )
    require(
        not (args.train_iters and args.train_samples),
        "--train-iters and --train-samples are both set: keep one (--config ... train-iters=null unsets a recipe's)",
    )
    if args.skip_train:
        return
    require(
        bool(args.train_iters or args.train_samples),
        "--train-iters is missing, or --train-samples: how long is the run?",
    )
    require(
        not args.train_samples or args.train_samples >= (args.global_batch_size or 1),
        f"--train-samples {args.train_samples} is less than --global-batch-size {args.global_batch_size}: no step",
    )
    _check_evaluation(args)
    _check_rates(args)
    _check_lengths(args, "iters" if args.train_iters else "samples")
    if args.step_batch_size_schedule is not None:
        _check_batches(args)


def _check_evaluation(args: Namespace) -> None:
    suite, interval = args.evaluate_suite, args.evaluate_interval
    if suite is None:
        return
    require(interval is not None, f"--evaluate-suite {suite} needs --evaluate-interval, the steps between evaluations")
    require(interval >= 1, f"--evaluate-interval {interval} must be at least 1")
    require(Path(suite).is_file(), f"--evaluate-suite {suite}: there is no such file")


def _check_rates(args: Namespace) -> None:
    require(args.lr is not None, "--lr is missing")
    for flag, rate in (("--min-lr", args.min_lr), ("--lr-warmup-init", args.lr_warmup_init)):
        require(rate <= args.lr, f"{flag} {rate} must be at most --lr {args.lr}")
    start, end = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style != "constant":
        require(
            start is not None and end is not None and start <= end,
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay and "
            "--end-weight-decay, which is not smaller",
        )


def _check_lengths(args: Namespace, unit: str) -> None:
    """`unit`: iters or samples, in which all lengths must be given."""
    other = "samples" if unit == "iters" else "iters"
    for name in ("lr-decay", "lr-warmup", "lr-wsd-decay"):
        value = getattr(args, f"{name}-{other}".replace("-", "_"))
        require(not value, f"--{name}-{other} {value} has no effect with --train-{unit}: give --{name}-{unit}")
    run = getattr(args, f"train_{unit}")
    warmup, decay = getattr(args, f"lr_warmup_{unit}"), getattr(args, f"lr_decay_{unit}")
    require(decay is None or decay > 0, f"--lr-decay-{unit} {decay} must be at least 1")
    require(
        args.lr_warmup_fraction is None or not warmup,
        f"--lr-warmup-fraction and --lr-warmup-{unit} are both set: keep one",
    )
    if args.lr_warmup_fraction is None:
        require(
            warmup < (decay or run),
            f"--lr-warmup-{unit} {warmup} must be below --lr-decay-{unit} {decay or run}, by default --train-{unit}",
        )
    last = getattr(args, f"lr_wsd_decay_{unit}")
    require(
        args.lr_decay_style != "WSD" or last is not None,
        f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of its last part",
    )
    require(
        last is None or last <= (decay or run),
        f"--lr-wsd-decay-{unit} {last} must be at most --lr-decay-{unit} {decay or run}, by default --train-{unit}: it "
        "is its last part",
    )


def _check_batches(args: Namespace) -> None:
    told = f"--step-batch-size-schedule '{args.step_batch_size_schedule}'"
    require(args.global_batch_size is None, f"{told} and --global-batch-size are both set: keep one")
    require(bool(args.train_samples), f"{told} needs --train-samples: the length of the run is that of its data")
    at_a_time = sequences_at_a_time(args)
    try:
        schedule = StepBatchsizeNumMicroBatchesCalculator(
            args.micro_batch_size,
            at_a_time // args.micro_batch_size,
            args.decrease_batch_size_if_needed,
            1,  # only the first rank's tells what it is
            args.step_batch_size_schedule,
            args.seq_length,
        ).schedule
    except (AssertionError, ValueError, OverflowError) as error:
        raise ValueError(f"{told}: {error}. Give '0:BATCH TOKENS:BATCH ...', such as '0:256 10B:512'") from None
    for _, batch in schedule:
        require(
            batch % at_a_time == 0,
            f"{told}: {batch} is not a multiple of --micro-batch-size {args.micro_batch_size} x "
            f"{at_a_time // args.micro_batch_size} data-parallel ranks = {at_a_time}: change it",
        )
    read = 0
    for (_, batch), (end, _) in zip(schedule, [*schedule[1:], (args.train_samples, 0)]):
        read += max(0, -(-(min(end, args.train_samples) - read) // batch)) * batch
    require(
        read == args.train_samples,
        f"--train-samples {args.train_samples} ends within a step of {told}, and the data may end there: give {read}",
    )
