"""Lengths, rates and batches that contradict each other."""

import pytest

from yoco_megatron.startup import arguments, schedule

SIZES = "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --micro-batch-size 2"
BASE = [*SIZES.split(), "--mock-data", "--lr", "1e-3"]
ITERS, SAMPLES = "--train-iters 10 ", "--train-samples 100 "


def check(flags: str) -> None:
    schedule.check(arguments.parse([*BASE, *flags.split()]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (ITERS + "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler", "are both set: keep one"),
        ("", "--train-iters is missing, or --train-samples"),
        (ITERS + SAMPLES, "--train-iters and --train-samples are both set"),
        (ITERS + "--min-lr 1", r"--min-lr 1.0 must be at most --lr 0.001"),
        (ITERS + "--lr-warmup-iters 2 --lr-warmup-init 1", r"--lr-warmup-init 1.0 must be at most --lr 0.001"),
        (ITERS + "--lr-decay-iters 0", "--lr-decay-iters 0 must be at least 1"),
        (ITERS + "--lr-warmup-iters 10", "--lr-warmup-iters 10 must be below --lr-decay-iters 10"),
        (SAMPLES + "--lr-warmup-iters 1", "--lr-warmup-iters 1 has no effect with --train-samples"),
        (ITERS + "--lr-decay-samples 5", "--lr-decay-samples 5 has no effect with --train-iters"),
        (ITERS + "--lr-warmup-fraction 0.1 --lr-warmup-iters 1", "--lr-warmup-fraction and --lr-warmup-iters are both"),
        (ITERS + "--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
        (ITERS + "--lr-decay-style WSD --lr-wsd-decay-iters 11", "--lr-wsd-decay-iters 11 must be at most .* 10,"),
        (ITERS + "--weight-decay-incr-style linear", "needs --start-weight-decay and --end-weight-decay"),
        (ITERS + "--step-batch-size-schedule 0:2", "needs --train-samples"),
        (SAMPLES + "--global-batch-size 102", "--train-samples 100 is less than --global-batch-size 102"),
        (SAMPLES + "--step-batch-size-schedule 0:2 --global-batch-size 2", "and --global-batch-size are both set"),
        (SAMPLES + "--step-batch-size-schedule 0:2,640:3", "3 is not a multiple of --micro-batch-size 2 x 1"),
        (SAMPLES + "--step-batch-size-schedule 0:2,640:4", "--train-samples 100 ends within a step .*: give 102"),
        (SAMPLES + "--step-batch-size-schedule 0:8,640:16,99999:2", "--train-samples 100 ends within .*: give 112"),
        (SAMPLES + "--step-batch-size-schedule 64:2", "threshold 0"),
        (SAMPLES + "--step-batch-size-schedule 0:2,x:4", r"Give '0:BATCH TOKENS:BATCH"),
        (SAMPLES + "--step-batch-size-schedule 0:2,inf:4", r"Give '0:BATCH TOKENS:BATCH"),
    ],
)
def test_one_error(flags, message):
    with pytest.raises(ValueError, match=message):
        check(flags)


@pytest.mark.parametrize(
    "flags", [ITERS, SAMPLES, SAMPLES + "--step-batch-size-schedule 0:2,704:4,9999:8", "--skip-train"]
)
def test_what_passes(flags):
    check(flags)
