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
        content = parse_yaml(text)
        wrong = mismatch(content, dict[str, Any]) or mismatch(content.get("tasks"), list[dict[str, Any]], "'tasks'")
        require(wrong is None, wrong or "")
        unknown = sorted(content.keys() - {"tasks"})
        require(not unknown, f"{unknown[:1]} is no key of a suite, which has 'tasks' alone")
        require(bool(content["tasks"]), "'tasks' is empty")
        tasks = [_named(make_task, settings, number) for number, settings in enumerate(content["tasks"], 1)]
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"{twice[:1]} is the name of two tasks: give one of them another, with 'name'")
        return tasks
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _named(make: Any, settings: dict[str, Any], number: int) -> Task:
    try:
        return make(settings)
    except ValueError as error:
        raise ValueError(f"task {number} ({settings.get('name', settings.get('task'))}): {error}") from None


def make_task(settings: dict[str, Any]) -> Task:
    """A task from its settings; `task` says which one. Raises ValueError."""
    settings = dict(settings)
    kind = settings.pop("task", None)
    require(isinstance(kind, str) and kind in TASKS, f"'task' is {kind!r}{nearest(str(kind), TASKS)}")
    module, _, name = TASKS[kind].rpartition(".")
    made: Any = getattr(importlib.import_module(module), name)
    types = get_type_hints(made)
    fields = {field.name for field in dataclasses.fields(made)}
    for key, value in settings.items():
        require(key in fields, f"{key!r} is no setting of {kind}{nearest(str(key), fields)}")
        wrong = mismatch(value, types[key], f"{key!r}")
        require(wrong is None, wrong or "")
        require(key != "name" or (bool(value) and "/" not in value), f"'name' is {value!r}: it names files of results")
    missing = [
        field.name
        for field in dataclasses.fields(made)
        if field.name not in settings
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    require(not missing, f"{missing[:1]} is missing")
    return made(**settings)
