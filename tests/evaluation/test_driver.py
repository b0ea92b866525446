"""A suite from beginning to end with a backend that needs no model: files, tables, what an interruption leaves."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.answers import KnowingBackend

from yoco_megatron.evaluation import driver, results
from yoco_megatron.evaluation.requests import Curve, Generate, Grid, Likelihood, Result, Score
from yoco_megatron.evaluation.results import Folder

MODEL = {"folder": "/model", "iteration": 10, "files": "abc"}


class Letters:
    """A token a letter."""

    start, end, banned = (), None, frozenset()

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: Any) -> str:
        return "".join(map(chr, ids))


@dataclass(frozen=True, kw_only=True)
class Echo:
    """The answer is to be a word."""

    kind: ClassVar = Generate
    name: str = "echo"
    words: list[str]

    def longest(self, tokenizer: Any) -> int:
        return 1 + max(map(len, self.words))

    def requests(self, tokenizer: Any) -> list[Generate]:
        return [Generate((1,), 5, expected=tuple(tokenizer.encode(word))) for word in self.words]

    def summarise(self, answers: Any, tokenizer: Any) -> Result:
        rows = [{"answer": tokenizer.decode(answer), "word": word} for answer, word in zip(answers, self.words)]
        right = sum(row["answer"] == row["word"] for row in rows) / len(rows)
        grid = Grid("depth", "length", (0.0, 1.0), (1024.0, 131072.0), ((right, None), (0.0, 1.0)))
        curve = Curve("by length", "length", "accuracy", (1024, 131072), (right, 0.0), (1, 1))
        metrics = {"accuracy": right, "of nothing": float("nan")}
        return Result(metrics, {"accuracy": 0.0}, {"prompts": len(rows)}, rows, {"filler": "none"}, grid, (curve,))


@dataclass(frozen=True, kw_only=True)
class First:
    """Scored: the first choice is right."""

    kind: ClassVar = Score
    name: str = "first"

    def longest(self, tokenizer: Any) -> int:
        return 3

    def requests(self, tokenizer: Any) -> list[Score]:
        return [Score((1,), ((2, 3), (4,)))] * 4

    def summarise(self, answers: Any, tokenizer: Any) -> Result:
        right = [answer[0].log_probability > answer[1].log_probability for answer in answers]
        return Result({"accuracy": sum(right) / len(right)}, counts={"documents": len(right)})


TASKS = [Echo(words=["word", "other"]), First()]


def test_files_of_a_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    contents = driver.evaluate(TASKS, KnowingBackend(Letters()), Folder(tmp_path, MODEL), "suite.yaml")
    assert {path.name for path in tmp_path.iterdir()} == {
        *("echo.json", "echo.records.jsonl", "echo.svg", "echo.by_length.svg"),
        *("first.json", "first.records.jsonl", "results.json"),
    }
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["model"] == MODEL
    assert whole["tasks"]["echo"]["metrics"] == {"accuracy": 1.0, "of nothing": None}
    assert whole["tasks"]["echo"]["settings"] == {
        "task": "Echo", "name": "echo", "words": ["word", "other"], "requests_at_most": None,
    }  # fmt: skip
    assert whole["tasks"]["first"]["counts"] == {"documents": 4}
    assert {"python", "torch", "yoco-megatron"} <= whole["versions"].keys()
    records = [json.loads(line) for line in (tmp_path / "echo.records.jsonl").read_text().splitlines()]
    assert records[0] == {"answer": "word", "word": "word"}
    assert json.loads((tmp_path / "echo.json").read_text())["grid"]["values"] == [[1.0, None], [0.0, 1.0]]
    assert results.table(contents).splitlines()[1].split() == ["echo", "accuracy", "1.0000", "0.000", "2", "prompts"]
    assert "echo: 2 of 2 requests" in capsys.readouterr().err


def test_an_interruption_loses_no_answer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    answered = []

    def stop() -> None:
        answered.append(1)
        if len(answered) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driver.evaluate(TASKS, KnowingBackend(Letters(), before=stop), Folder(tmp_path, MODEL), "suite.yaml")
    assert (tmp_path / "echo.json").exists() and not (tmp_path / "first.json").exists()
    contents = driver.evaluate(TASKS, KnowingBackend(Letters(), before=stop), Folder(tmp_path, MODEL), "suite.yaml")
    assert len(answered) == 4 + 3  # those of the second task that had not been answered
    assert [one["metrics"]["accuracy"] for one in contents] == [1.0, 1.0]
    assert contents[1]["counts"] == {"documents": 4}
    assert not list(tmp_path.glob("*.answers.jsonl"))


@pytest.mark.parametrize("line", ['{"model": {}}', "[[-1.0, true", ""])  # another's, cut short
def test_answers_that_are_of_no_use_are_asked_for_again(tmp_path: Path, line: str) -> None:
    answers = Folder(tmp_path, MODEL).answers(TASKS[1], None)
    with answers.keeping([]) as keep:
        keep([Likelihood(float("-inf"), True), Likelihood(-1.5, False)])
    whole = answers.path.read_text()
    assert answers.read() == [[Likelihood(float("-inf"), True), Likelihood(-1.5, False)]]
    answers.path.write_text(f"{line}\n" if line.startswith("{") else whole + line)
    assert len(answers.read()) == (0 if line.startswith("{") else 1)


@pytest.mark.parametrize("other", ["model", "settings", "limit"])
def test_results_of_something_else_are_not_taken(tmp_path: Path, other: str) -> None:
    backend, words = KnowingBackend(Letters()), replace(TASKS[0], name="first")
    driver.evaluate(TASKS[1:], backend, Folder(tmp_path, MODEL), "suite.yaml")
    model = MODEL | ({"iteration": 20} if other == "model" else {})
    tasks = [words] if other == "settings" else TASKS[1:]
    limit = 2 if other == "limit" else None
    what = {"model": "iteration", "settings": "task", "limit": "requests_at_most"}[other]
    with pytest.raises(ValueError, match=rf"first\.json is of (a model|settings) with another .*{what}"):
        driver.evaluate(tasks, backend, Folder(tmp_path, model), "suite.yaml", limit)
    (content,) = driver.evaluate(tasks, backend, Folder(tmp_path, model, overwrite=True), "suite.yaml", limit)
    assert content["counts"] in ({"documents": limit or 4}, {"prompts": 2})
    again = Folder(tmp_path, model, overwrite=True).finished(tasks[0], limit)
    assert again == content, "repeated after an interruption, what is finished is not done again"


def test_lengths_beyond_the_model(tmp_path: Path) -> None:
    driver.check(TASKS, Letters(), 6)
    with pytest.raises(ValueError, match="task echo has sequences of 6 tokens, but the model's end at 5"):
        driver.check(TASKS, Letters(), 5)


@pytest.mark.parametrize("line", ["5", "[5]", '[["a", true]]', "[[1.0]]"])
def test_damaged_answers_are_asked_for_again(tmp_path: Path, line: str) -> None:
    answers = Folder(tmp_path, MODEL).answers(TASKS[1], None)
    with answers.keeping([[Likelihood(-1.5, False)]]):
        pass
    with answers.path.open("a") as file:
        file.write(f"{line}\n")
    assert answers.read() == []


def test_damaged_results_are_an_error(tmp_path: Path) -> None:
    for content in ({"model": 3}, {"model": MODEL, "settings": results.settings_of(TASKS[0], None)}):
        (tmp_path / "echo.json").write_text(json.dumps(content))
        assert Folder(tmp_path, MODEL, overwrite=True).finished(TASKS[0], None) is None
        with pytest.raises(
            ValueError, match=r"echo\.json does not hold what it should.*: remove it, or add --overwrite"
        ):
            Folder(tmp_path, MODEL).finished(TASKS[0], None)


@pytest.mark.parametrize("changed", ["text.txt", "stored.bin"])
def test_answers_about_other_texts_are_not_taken(tmp_path: Path, changed: str) -> None:
    @dataclass(frozen=True, kw_only=True)
    class OfFiles(First):
        data: str

    for name in ("text.txt", "stored.bin", "stored.idx"):
        (tmp_path / name).write_text("one")
    task = OfFiles(data=str(tmp_path / changed.removesuffix(".bin")))
    folder = Folder(tmp_path / "results", MODEL)
    driver.evaluate([task], KnowingBackend(Letters()), folder, "suite.yaml")
    assert folder.finished(task, None)
    (tmp_path / changed).write_text("two or more")
    with pytest.raises(ValueError, match="settings with another data_files: name another --output"):
        folder.finished(task, None)


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    first = Folder(tmp_path, MODEL)
    first.hold()
    with pytest.raises(ValueError, match="another evaluation is writing there"):
        Folder(tmp_path, MODEL).hold()
