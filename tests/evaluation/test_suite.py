"""Suites: those of the repository can be read, and a mistake in one is an error that names file, task and key."""

import importlib
from pathlib import Path

import pytest
from support.word_tokenizer import WordTokenizer

from yoco_megatron.config.yaml_files import parse_yaml
from yoco_megatron.evaluation.requests import Generate, Score, TokenLosses
from yoco_megatron.evaluation.suite import make_task, read_suite
from yoco_megatron.evaluation.tasks import TASKS

CONFIGS = Path(__file__).parents[2] / "configs/evaluation"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_suites_of_the_repository(path: Path, tmp_path: Path) -> None:
    """With a folder of text for those that name one, and without the package of texts."""
    (tmp_path / "some.txt").write_text("a b c")
    tasks = parse_yaml(path.read_text())["tasks"]
    for settings in tasks:
        for key in {"filler", "data"} & settings.keys():
            settings[key] = str(tmp_path)
        if settings["task"] == "multiple_choice":
            assert set(settings) <= {"task", "name", "benchmarks"}
        else:
            assert make_task(settings).name == settings.get("name", settings["task"])


def test_quick_suite_fits_a_tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parents[1])
    for task in read_suite(CONFIGS / "quick.yaml"):
        assert task.longest(WordTokenizer()) <= 256 and len(task.requests(WordTokenizer())) < 20


@pytest.mark.parametrize("name", TASKS)
def test_tasks_say_what_they_ask(name: str) -> None:
    module, _, kind = TASKS[name].rpartition(".")
    made = getattr(importlib.import_module(module), kind)
    assert made.kind in (Generate, Score, TokenLosses)
    assert made.name == name


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(
        "tasks:\n- {task: needle, lengths: [200], filler: noise}\n"
        "- {task: needle, name: long, lengths: [400], filler: noise, strip: true}\n"
    )
    assert [task.name for task in read_suite(path)] == ["needle", "long"]


NEEDLE = "task: needle, lengths: [200], filler: noise"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["the content is None"]),
        ("tasks: [{task: phonebook, entries: [3], name: results}]", ["task 1", "'name' is 'results'"]),
        ("tasks: [", ["not valid YAML"]),
        ("tasks: []", ["'tasks' is empty"]),
        ("tasks: 3", ["'tasks' is 3"]),
        (f"tasks: [{{{NEEDLE}}}]\nseed: 3", ["'seed'", "'tasks' alone"]),
        ("tasks: [{lengths: [200]}]", ["task 1", "'task' is None"]),
        ("tasks: [{task: needles}]", ["task 1 (needles)", "did you mean needle?"]),
        (f"tasks: [{{{NEEDLE}, depth: 3}}]", ["task 1 (needle)", "'depth'", "did you mean depths?"]),
        (f"tasks: [{{{NEEDLE}, depths: x}}]", ["'depths': the value is 'x', not int"]),
        (f"tasks: [{{{NEEDLE}, strip: 1}}]", ["'strip': the value is 1, not bool"]),
        (f"tasks: [{{{NEEDLE}, name: a/b}}]", ["'name' is 'a/b'"]),
        (f'tasks: [{{{NEEDLE}, name: "a\\n"}}]', ["'name' is 'a\\n'"]),
        ("tasks: [{task: needle, lengths: [x], filler: noise}]", ["task 1 (needle)", "'lengths'", "'x', not int"]),
        ("tasks: [{task: needle, lengths: [200]}]", ["task 1 (needle)", "'filler' is missing"]),
        (f"tasks: [{{{NEEDLE}}}, {{{NEEDLE}}}]", ["task 2 (needle)", "the same name"]),
        (f"tasks: [{{{NEEDLE}}}, {{{NEEDLE}, name: b, depths: 1}}]", ["task 2 (b)", "'depths' is 1"]),
    ],
)
def test_mistakes(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_suite(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value
    assert "\n" not in str(error.value)


def test_missing_suite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml is missing"):
        read_suite(tmp_path / "none.yaml")
