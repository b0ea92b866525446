"""Pictures, as PNG or SVG by the name of the file: curves of runs, heat maps and curves of evaluations."""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from yoco_megatron.evaluation.comparison import short, shown
from yoco_megatron.evaluation.requests import Curve, Grid
from yoco_megatron.evaluation.run_curves import LOSS, VALIDATION, RunCurves
from yoco_megatron.utils.errors import require

SMOOTHED = 100  # points of a drawn training loss, each the mean of what lies between two


def require_matplotlib() -> None:
    """Raises ValueError where it is missing."""
    found = importlib.util.find_spec("matplotlib")
    require(found is not None, "pictures are drawn with the package matplotlib: pip install matplotlib")


@contextlib.contextmanager
def figure(path: Path, rows: int, columns: int, width: float = 4.5, height: float = 3.4) -> Iterator[list[Any]]:
    """The axes of a picture, which is written to `path` at the end.

    Raises:
        ValueError: matplotlib is missing; the file cannot be written.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Names in the file by content, so that a picture drawn again is the same file.
    style: dict[Any, Any] = {"svg.hashsalt": "yoco", "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
    style["axes.formatter.limits"] = (-4, 4)  # longer numbers of tokens run into each other
    with matplotlib.rc_context(style):
        drawn, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
        try:
            yield list(axes.flat)
            drawn.tight_layout()
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
        except OSError as error:
            raise ValueError(f"{path}: cannot write there ({error.strerror})") from None
        finally:
            pyplot.close(drawn)


def against_tokens(panel: Any) -> None:
    """Counts of tokens along x, as 50M instead of 0.5 with 1e8 in a corner."""
    panel.set_xlabel("tokens")
    panel.xaxis.set_major_formatter(lambda count, _: short(count))


def draw_runs(path: Path, runs: list[RunCurves]) -> None:
    """Training losses (lines) and validation losses (dots) against tokens, FLOPs and hours; throughput."""
    scales: list[tuple[str, Callable[[RunCurves, Any], Any]]] = [
        ("tokens", RunCurves.tokens), ("training FLOPs", RunCurves.flops), ("hours", RunCurves.hours),
    ]  # fmt: skip
    with figure(path, 2, 2) as axes:
        for panel, (label, scale) in zip(axes, scales):
            for number, run in enumerate(runs):
                if scale(run, 0) is None:
                    continue
                loss, colour = run.curves[LOSS], f"C{number % 10}"
                style = ("-", "--", ":")[number // 10 % 3]
                steps, values = smoothed(loss.steps, loss.values)
                panel.plot(scale(run, steps), values, style, color=colour, linewidth=1, label=run.name)
                if VALIDATION in run.curves:
                    points = run.curves[VALIDATION]
                    panel.plot(scale(run, points.steps), points.values, "o", color=colour, markersize=3)
            if label == "tokens":
                against_tokens(panel)
            else:
                panel.set_xlabel(label)
            panel.set_ylabel("loss (nats a token)")
            panel.set_ylim(*loss_range(runs))
        for number, run in enumerate(runs):
            rate = run.throughput()
            axes[3].plot(run.tokens(rate.steps), rate.values, color=f"C{number % 10}", linewidth=1)
        against_tokens(axes[3])
        axes[3].set_ylabel("tokens a second")
        axes[3].set_ylim(bottom=0)
        axes[0].legend(fontsize=7)
        axes[0].set_title("training: lines, validation: dots", fontsize=9)


def loss_range(runs: list[RunCurves]) -> tuple[float, float]:
    """What is worth seeing: from the lowest loss to what the worst run had after a tenth of its tokens."""
    values = [run.curves[LOSS] for run in runs]
    lows = [float(one.values[np.isfinite(one.values)].min(initial=np.inf)) for one in values]
    highs = [float(np.interp(0.1 * one.steps[-1], one.steps, one.values)) for one in values]
    low = min(filter(math.isfinite, lows), default=0.0)  # of a run that diverged, what it had before
    high = max(filter(math.isfinite, highs), default=low)
    room = 0.05 * max(high - low, 1e-3)
    return low - room, high + room


def smoothed(steps: Any, values: Any) -> tuple[Any, Any]:
    """Means over so many equal parts of the points that a line is drawn of."""
    parts = [part for part in np.array_split(np.arange(len(steps)), SMOOTHED) if len(part)]
    return np.array([steps[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def evaluation_tags(runs: list[RunCurves]) -> list[str]:
    """Curves of evaluation that at least one run has."""
    return sorted({tag for run in runs for tag in run.curves if shown(tag)})


def draw_evaluations(path: Path, runs: list[RunCurves]) -> None:
    """A panel for each metric of evaluation while training, against tokens."""
    tags = evaluation_tags(runs)
    columns = min(3, len(tags))
    with figure(path, -(-len(tags) // columns), columns, 3.6, 2.6) as axes:
        for panel in axes[len(tags) :]:
            panel.set_axis_off()
        for panel, tag in zip(axes, tags):
            for number, run in enumerate(runs):
                if tag in run.curves:
                    points = run.curves[tag]
                    panel.plot(run.tokens(points.steps), points.values, "o-", color=f"C{number % 10}", markersize=3,
                               linewidth=1, label=run.name)  # fmt: skip
            panel.set_title(tag.removeprefix("evaluation/"), fontsize=8)
            against_tokens(panel)
        axes[0].legend(fontsize=7)


def draw_grid(path: Path, grid: Grid, title: str) -> None:
    """A heat map as in the YOCO paper: green is right, red is wrong."""
    with figure(path, 1, 1, 1.5 + 0.62 * len(grid.columns), 1.4 + 0.32 * len(grid.rows)) as (panel,):
        panel.grid(False)
        panel.imshow(np.array(grid.values, float), cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for row, values in enumerate(grid.values):
            for column, value in enumerate(values):
                text = "" if value is None or np.isnan(value) else f"{100 * value:.0f}"
                panel.text(column, row, text, ha="center", va="center", fontsize=7)
        for axis, marks, name in (
            (panel.xaxis, grid.columns, grid.column_name),
            (panel.yaxis, grid.rows, grid.row_name),
        ):
            axis.set_ticks(range(len(marks)), [_mark(mark) for mark in marks], fontsize=7)
            axis.set_label_text(name)
        panel.set_title(f"{title} (% right)", fontsize=9)


def _mark(value: float) -> str:
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:g}K" if value < 1 << 20 else f"{value / (1 << 20):g}M"
    return f"{value:g}"


def draw_curve(path: Path, curve: Curve, title: str) -> None:
    """y over x; a logarithmic axis where x spans more than a factor of 20."""
    with figure(path, 1, 1) as (panel,):
        panel.plot(curve.x, curve.y, "o-", markersize=3, linewidth=1)
        if min(curve.x, default=0) > 0 and max(curve.x) > 20 * min(curve.x):
            panel.set_xscale("log", base=2)
        panel.set_xlabel(curve.x_name)
        panel.set_ylabel(curve.y_name)
        panel.set_title(f"{title}: {curve.name}", fontsize=9)
