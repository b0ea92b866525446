"""Suites of evaluation tasks: YAML files with a list of tasks and their settings.

    tasks:
    - {task: needle, lengths: [4096, 8192], depths: 11, samples: 10, filler: FOLDER}

`name` renames a task in its results, which it needs where a suite has it twice.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any, get_type_hints

from yoco_megatron.config.yaml_files import LIMIT, parse_yaml
from yoco_megatron.evaluation.requests import Task
from yoco_megatron.evaluation.tasks import TASKS
from yoco_megatron.utils.errors import nearest, require
from yoco_megatron.utils.small_files import mismatch, read_text


def read_suite(path: Path) -> list[Task]:
    """The tasks of a suite, their settings and files checked; no model is needed.

    Raises:
        ValueError: no such file, not YAML, an unknown task or setting, a value that does not fit.
    """
    text = read_text(path, LIMIT)
    try:
        return _tasks(parse_yaml(text))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tasks(content: Any) -> list[Task]:
    wrong = mismatch(content, dict[str, Any]) or mismatch(content.get("tasks"), list[dict[str, Any]], "'tasks'")
    require(wrong is None, wrong or "")
    require(bool(content["tasks"]), "'tasks' is empty")
    for key in content:
        require(key == "tasks", f"{key!r} is no key of a suite, which has 'tasks' alone")
    made: dict[str, Task] = {}
    for number, settings in enumerate(content["tasks"], 1):
        try:
            task = make_task(settings)
            require(task.name not in made, "another task has the same name: give one of them another 'name'")
        except ValueError as error:
            title = " ".join(str(settings.get("name", settings.get("task"))).split())
            raise ValueError(f"task {number} ({title}): {error}") from None
        made[task.name] = task
    return list(made.values())


def make_task(settings: dict[str, Any]) -> Task:
    """A task from its settings; `task` says which one. Raises ValueError."""
    settings = dict(settings)
    which = settings.pop("task", None)
    require(isinstance(which, str) and which in TASKS, f"'task' is {which!r}{nearest(str(which), TASKS)}")
    module, _, name = TASKS[which].rpartition(".")
    made: Any = getattr(importlib.import_module(module), name)
    types, fields = get_type_hints(made), dataclasses.fields(made)
    names = [field.name for field in fields]
    for key, value in settings.items():
        require(key in names, f"{key!r} is no setting of {which}{nearest(str(key), names)}")
        wrong = mismatch(value, types[key], "the value")
        require(wrong is None, f"{key!r}: {wrong}")
    for field in fields:
        is_required = field.default is dataclasses.MISSING
        require(field.name in settings or not is_required, f"{field.name!r} is missing")
    title = settings.get("name", which)
    require(
        0 < len(title) <= 100 and title.isprintable() and "/" not in title,
        f"'name' is {title[:100]!r}: files of results have it, so up to 100 characters, and no /",
    )
    require(title != "results", "'name' is 'results', as the file of all results is called")
    return made(**settings)
