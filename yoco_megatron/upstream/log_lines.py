"""The lines of the log for a step and for an evaluation, of about 120 columns, more with further losses.

--verbose: Megatron's own.
"""

import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.training import get_args, get_tokenizer

from yoco_megatron.checkpoint import validation_record
from yoco_megatron.data.text_size import bits_per_byte, of_validation
from yoco_megatron.upstream import step_positions, throughput
from yoco_megatron.upstream.registry import replaces

STEP = re.compile(r" \[\d{4}-(.*?):\d\d\.\d+\] iteration +(\d+)/ *(\d+) \|(.*)\|")
EVALUATION = re.compile(
    r" validation(?P<set>\S*) loss at (?P<at>iteration (?P<iteration>\d+).*?)"
    r" \| (?P<name>[^|]+) value: (?P<loss>\S+) \|(?P<more>.*)"
)
LEFT_OUT = {"consumed samples", "elapsed time per iteration (ms)", "throughput per GPU (TFLOP/s/GPU)"}
WHERE_NOT = {"loss scale": 1.0, "number of skipped iterations": 0.0, "number of nan iterations": 0.0}
"""Shown where they have another value."""
FIRST = ("lm loss", "grad norm", "learning rate", "global batch size")
SHORT = {"grad norm": "norm", "learning rate": "lr"}
SHORT |= {"number of skipped iterations": "skipped", "number of nan iterations": "nan"}
DIGITS = {"lm loss": "#.7G", "learning rate": ".2e"}
OF_OTHER_LOSSES = "#.5G"
BETWEEN = "  "
"""Names and values have single spaces."""

rates: throughput.Rates | None = None
"""Of the line that is about to be printed."""
bytes_per_token: dict[str, float] = {}
"""Of the validation sets; see data/text_size.py."""


def measure_text(valid: Any) -> None:
    """Count the bytes of text in the validation data. Collective: the first rank, which has data, tells the others."""
    found = [of_validation(get_args(), valid, get_tokenizer()) if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(found, src=0)
    bytes_per_token.update(found[0])


def step_line(message: str, rates: Iterable[str], batch_size_changes: bool) -> str:
    """Megatron's line of a step without what stays the same, shorter, and with `rates`."""
    found = STEP.fullmatch(message.rstrip())
    if found is None:
        return message
    when, iteration, last, rest = found.groups()
    fields = dict(part.strip().rsplit(": ", 1) for part in rest.split("|") if ": " in part)
    wanted = [*(name for name in FIRST if name in fields), *(name for name in fields if name not in FIRST)]
    parts = []
    for name in wanted:
        value = fields[name].strip()
        if name in LEFT_OUT or (name in WHERE_NOT and float(value) == WHERE_NOT[name]):
            continue
        if name == "global batch size" and not batch_size_changes:
            continue
        digits = DIGITS.get(name, OF_OTHER_LOSSES if name.endswith("loss") else None)
        parts.append(f"{SHORT.get(name, name)} {value if digits is None else f'{float(value):{digits}}'}")
    return BETWEEN.join([when, f"{iteration:>{len(last)}}/{last}", *parts, *rates])


def evaluation_scalars(message: str) -> dict[str, float]:
    """Name -> value of what an evaluation adds to Megatron's curves."""
    found = EVALUATION.match(message)
    assert found is not None, message
    if found["name"] != "lm loss":
        return {}
    loss, size = float(found["loss"]), bytes_per_token.get(found["set"])
    scalars = {"perplexity": math.exp(min(loss, 700.0))}
    return scalars if size is None else scalars | {"bits-per-byte": bits_per_byte(loss, size)}


def evaluation_line(message: str, scalars: dict[str, float]) -> str:
    """Megatron's line of an evaluation, shorter, with `scalars`."""
    found = EVALUATION.match(message)
    assert found is not None, message
    shown = [f"{name.replace('-', ' ')} {f'{value:#.4g}'.rstrip('.')}" for name, value in scalars.items()]
    losses = [(found["name"], found["loss"]), *re.findall(r" ([^|]+) value: (\S+) ", found["more"])]
    values = [f"{name} {float(loss):#.7G}" for name, loss in losses]
    what = f"validation{found['set']} loss at {found['at']}"
    return BETWEEN.join([time.strftime("%m-%d %H:%M"), what, *values, *shown])


def _record(args: Namespace, iteration: int, name: str, numbers: dict[str, float]) -> None:
    """Beside the checkpoints; a disk in trouble does not end the run before it must save."""
    if args.save is None or args.skip_train:
        return
    try:
        validation_record.add(Path(args.save), iteration, name.removeprefix("-"), numbers)
    except (OSError, ValueError) as error:
        print(f"warning: {validation_record.FILE_NAME} could not be written: {error}", file=sys.stderr, flush=True)


@replaces(
    "megatron.training.training",
    "print_rank_last",
    digest="84fa73764d1a5148",
    why="a step's line has 250 columns and no tokens a second, time left or memory; an evaluation's is framed by "
    "dashes and has no bits per byte",
)
def print_rank_last(message: str) -> None:
    """Print, on the last rank; what an evaluation adds to Megatron's curves is written as well."""
    if dist.get_rank() != dist.get_world_size() - 1:
        return
    args = get_args()
    if evaluation := EVALUATION.match(message):
        scalars = evaluation_scalars(message)
        if not evaluation["at"].endswith("on test set"):  # Megatron writes that loss under the same name
            named = {f"validation{evaluation['set']}/{name}": value for name, value in scalars.items()}
            iteration = int(evaluation["iteration"])
            throughput.write_scalars(named, iteration)
            if scalars:  # a language model's
                _record(args, iteration, evaluation["set"], {"loss": float(evaluation["loss"])} | scalars)
        message = message if args.verbose else evaluation_line(message, scalars)
    elif STEP.fullmatch(message.rstrip()):
        assert rates is not None, "training_log sets them first"
        positions = step_positions.texts()
        if args.verbose:
            message = re.sub(r"throughput per GPU \(TFLOP/s/GPU\): \S+ \|", rates.in_megatrons_style(), message)
            message += "".join(f" {text} |" for text in positions)
        else:
            changes = args.rampup_batch_size is not None or args.step_batch_size_schedule is not None
            message = step_line(message, [*rates.texts(), *positions], changes)
    elif not args.verbose and set(message) == {"-"}:
        return
    print(message, flush=True)
