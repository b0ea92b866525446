"""The curves of a training run, read from what it left: the event files of all its attempts, joined to one history.

An attempt that starts at an earlier step than the one before it reached takes its place from there on: what was
abandoned is no part of a curve, and neither are its hours.
"""

from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from yoco_megatron.config.yaml_files import parse_yaml
from yoco_megatron.costs.flops import train_flops
from yoco_megatron.costs.shape import ModelShape, body_parameters
from yoco_megatron.evaluation import event_file
from yoco_megatron.evaluation.event_file import EventFile, Point
from yoco_megatron.utils.errors import require

LOSS, VALIDATION, SAMPLES = "lm loss", "lm loss validation", " vs samples"
SPEED, GPU_SPEED = "throughput/tokens-per-second", "throughput/tflops-per-gpu"
COMPUTED = "positions/computed"  # their share, where loss masks of the data decide it
EVALUATION = "evaluation/"
SHARE = 0.02  # of a run's tokens: a training loss is the mean of the last steps of so many


@dataclass(frozen=True)
class Series:
    """A curve: steps, ascending, and values, float64 [n]."""

    steps: Any
    values: Any


@dataclass(frozen=True)
class RunCurves:
    """A run: its curves by tag, and what a step is in tokens, FLOPs and hours.

    tokens_at, hours_at: pairs of steps and what had been reached then, float64 [2, n].
    flops_per_token: of training, forward and backward; None where the model is not known.
    notes: what a reader of the curves must know.
    """

    name: str
    model: str
    parameters: int | None
    gpus: int
    curves: dict[str, Series]
    tokens_at: Any
    hours_at: Any
    flops_per_token: float | None
    notes: list[str] = field(default_factory=list)

    def tokens(self, steps: Any) -> Any:
        """Training tokens at `steps`."""
        return np.interp(steps, *self.tokens_at)

    def hours(self, steps: Any) -> Any:
        """Hours at `steps`, of the attempts that got there, start and validation included, waiting between them not."""
        return np.interp(steps, *self.hours_at)

    def flops(self, steps: Any) -> Any:
        """Training FLOPs at `steps`; None where the model is not known."""
        return None if self.flops_per_token is None else self.tokens(steps) * self.flops_per_token

    @property
    def last_step(self) -> int:
        """The last one of which something was written."""
        return int(self.tokens_at[0, -1])

    @property
    def last_tokens(self) -> float:
        return float(self.tokens(self.last_step))

    def training_loss(self, tokens: float | None = None) -> float | None:
        """Mean over the logged steps of the last 2% before so many tokens (None: all); None beyond the run's end."""
        end = self.last_tokens if tokens is None else tokens
        if end > self.last_tokens * (1 + 1e-9):
            return None
        loss = self.curves[LOSS]
        at = self.tokens(loss.steps)
        near = loss.values[(at <= end * (1 + 1e-9)) & (at > end - SHARE * self.last_tokens)]
        return float(near.mean()) if len(near) else float(np.interp(end, at, loss.values))

    def value(self, tag: str, tokens: float | None = None) -> float | None:
        """Of a curve with few points, between which it is interpolated; None outside them."""
        if tag not in self.curves:
            return None
        series = self.curves[tag]
        at = self.tokens(series.steps)
        end = at[-1] if tokens is None else tokens
        if not at[0] * (1 - 1e-9) <= end <= at[-1] * (1 + 1e-9):
            return None
        return float(np.interp(end, at, series.values))

    def validation_tags(self) -> list[str]:
        """Losses on validation sets, of which a run may have several."""
        return [tag for tag in self.curves if tag.startswith(VALIDATION)]

    def speed(self) -> tuple[float, float | None]:
        """(tokens/s, TFLOP/s per GPU): medians over the second half of the run; see `throughput`."""
        rate = self.throughput()
        tokens = float(np.median(rate.values[len(rate.values) // 2 :]))
        flops = None if self.flops_per_token is None else tokens * self.flops_per_token / self.gpus / 1e12
        return tokens, flops

    def throughput(self) -> Series:
        """Tokens a second: of the steps alone, as training writes it; else from the times of the losses."""
        if (logged := self.curves.get(SPEED)) is not None:
            return logged
        steps = self.curves[LOSS].steps
        if len(steps) < 2:
            steps = np.array([0, *steps])
        seconds = np.diff(self.hours(steps)) * 3600
        with np.errstate(divide="ignore", invalid="ignore"):
            rates = np.diff(self.tokens(steps)) / seconds
        good = np.isfinite(rates)
        return Series(steps[1:][good], rates[good]) if good.any() else Series(steps[1:], np.zeros(len(rates)))


def event_files(run: Path) -> list[Path]:
    """The event files of a run: in RUN/tensorboard, RUN, or beside RUN where it is the folder of checkpoints.

    Raises:
        ValueError: there are none.
    """
    require(run.is_dir(), f"{run} is no folder of a run")
    for folder in (run / "tensorboard", run, run.parent / "tensorboard" if run.name == "checkpoints" else run):
        if found := sorted(folder.glob("events.out.tfevents.*")):
            return found
    raise ValueError(
        f"{run} holds no event file of TensorBoard (events.out.tfevents.*), nor does its folder tensorboard: "
        "train with --tensorboard-dir RUN/tensorboard, and name RUN"
    )


def joined(files: list[EventFile]) -> tuple[dict[str, list[Point]], list[tuple[int, float]]]:
    """(points by tag, (step, hours) of every point): one history from the attempts' files, oldest first."""
    history: dict[str, list[Point]] = {}
    clock: list[tuple[int, float]] = []
    for file in files:
        if not any(file.scalars.values()):
            continue
        starts = {tag: points[0].step for tag, points in file.scalars.items() if not tag.endswith(SAMPLES)}
        first = min(starts.values())
        for tag, points in history.items():
            key = tag.removesuffix(SAMPLES)
            kept = [point for point in points if point.step <= first and point.step < starts.get(key, first + 1)]
            points[:] = kept
        clock = [(step, hours) for step, hours in clock if step < first]
        before = max((hours for _, hours in clock), default=0.0)
        for tag, points in file.scalars.items():
            if not tag.endswith(SAMPLES):
                # At the end of a run Megatron writes the loss on the test set under the tag of the validation set, too.
                first_of = {point.step: point for point in reversed(points)}
                history.setdefault(tag, []).extend(first_of.values())
        # Of a step, its loss is written first; the last one may have a validation loss alone.
        reached = {point.step: point.time for tag in (VALIDATION, LOSS) for point in file.scalars.get(tag, [])}
        clock += [(step, before + (time - file.start) / 3600) for step, time in reached.items()]
    return history, clock


def _samples(files: list[EventFile]) -> dict[int, float]:
    """Samples trained on at each step of which something was written."""
    found: dict[int, float] = {}
    for file in files:
        pairs = [
            (point.step, count.step)
            for tag in (LOSS, VALIDATION)
            for point, count in zip(file.scalars.get(tag, []), file.scalars.get(tag + SAMPLES, []))
        ]
        first = min(pairs, default=(0, 0))[0]
        found = {step: value for step, value in found.items() if step < first or not pairs} | dict(pairs)
    return found


def read_run(run: Path, name: str | None = None) -> RunCurves:
    """The curves of the run in a folder.

    Raises:
        ValueError: it has none, or they are damaged.
    """
    paths = event_files(run)
    files = sorted((event_file.read(path) for path in paths), key=lambda file: file.start)
    history, clock = joined(files)
    counted = sorted(_samples(files).items())
    require(
        bool(history.get(LOSS)) and bool(counted),
        f"{paths[0].parent} holds no training loss: no step was logged there (--tensorboard-log-interval)",
    )
    flags = next(file.flags for file in reversed(files) if file.scalars.get(LOSS))
    require("seq_length" in flags, f"{paths[0].parent} does not tell the flags of the run: it is not of this trainer")
    arguments = Namespace(**{key: _parsed(value) for key, value in flags.items()})
    notes: list[str] = []
    shape = None
    try:
        shape = ModelShape.from_args(arguments)
        flops_per_token = train_flops(shape, 1) / arguments.seq_length
        parameters = body_parameters(shape)
    except (ValueError, AttributeError, TypeError) as error:
        notes.append(f"FLOPs are not known: {error}")
        flops_per_token = parameters = None
    curves = {tag: _series(points) for tag, points in history.items() if points}
    if COMPUTED in curves and flops_per_token is not None:
        flops_per_token = None
        if SPEED in curves and GPU_SPEED in curves:
            per_second = np.median(curves[GPU_SPEED].values) * 1e12 * arguments.world_size
            flops_per_token = float(per_second / np.median(curves[SPEED].values))
        else:
            notes.append(
                "FLOPs are not known: they vary with the data's loss masks, and --log-throughput was not given"
            )
    steps, samples = zip(*counted)
    clock = sorted(clock)
    return RunCurves(
        name or run.name,
        model_name(arguments),
        parameters,
        int(arguments.world_size),
        curves,
        np.array([[0, *steps], [0, *(count * arguments.seq_length for count in samples)]], dtype=float),
        np.array([[0, *(step for step, _ in clock)], [0, *(hours for _, hours in clock)]], dtype=float),
        flops_per_token,
        notes,
    )


def _series(points: list[Point]) -> Series:
    points = sorted(points)
    return Series(np.array([point.step for point in points], float), np.array([point.value for point in points], float))


def _parsed(text: str) -> Any:
    if text == "None":
        return None
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def model_name(arguments: Namespace) -> str:
    """What a table says of a model."""
    if getattr(arguments, "architecture", "yoco") == "transformer":
        return "Transformer"
    return f"YOCO, {str(getattr(arguments, 'self_decoder', '?')).replace('_', ' ')}"
