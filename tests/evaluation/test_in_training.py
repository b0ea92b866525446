"""--evaluate-suite: a run with it is bitwise the run without it, and scores are the same at every mesh.

Tolerance between meshes: fp32 sums in another order, in scores 1e-5 nats after some steps.
"""

import json
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from support.answers import KnowingBackend
from support.cli import TINY, Log, Runs, checkpoint, run_script
from support.evaluation import write_suite
from support.word_tokenizer import WordTokenizer

from yoco_megatron.evaluation import in_training
from yoco_megatron.evaluation.tasks.loss_by_position import LossByPosition
from yoco_megatron.evaluation.tasks.phonebook import Phonebook
from yoco_megatron.startup.arguments import parse_for_job
from yoco_megatron.upstream import between_steps

STEPS, INTERVAL = 4, 2
MESHES = {
    "TP2": (
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--hidden-dropout", "0.1", "--loss-suffix", "64"),
    ),
    "PP2": ("--pipeline-model-parallel-size", "2"),
    "DP2": ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
}


def flags(tokenizer: Path, *more: str) -> list[str]:
    text = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--vocab-size", "400")
    steps = ("--train-iters", str(STEPS), "--seq-length", "320", "--eval-interval", "2")
    return [*TINY, *text, *steps, "--global-batch-size", "4", "--micro-batch-size", "1", *more]


def figures(log: Log) -> tuple[Any, ...]:
    return log.losses, log.grad_norms, log.validation


def test_training_does_not_notice(tmp_path: Path, bpe_folder: Path) -> None:
    suite = ("--evaluate-suite", str(write_suite(tmp_path)), "--evaluate-interval", str(INTERVAL))
    runs: dict[Any, list[str]] = {}
    for mesh, own in MESHES.items():
        for evaluates in (False, True):
            save = ("--save", str(tmp_path / f"{mesh}_{evaluates}"), "--save-interval", str(STEPS))
            more = ("--tensorboard-dir", str(tmp_path / mesh), *suite) if evaluates else ()
            runs[mesh, evaluates] = flags(bpe_folder, *own, *save, *more)
    found = Runs(2, runs)
    scores = {}
    for mesh in MESHES:
        assert len(found[mesh, False].losses) == STEPS
        assert figures(found[mesh, True]) == figures(found[mesh, False]), mesh
        plain, evaluated = (checkpoint(tmp_path / f"{mesh}_{evaluates}", STEPS) for evaluates in (False, True))
        assert plain.keys() == evaluated.keys()
        for name, value in plain.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, evaluated[name]), (mesh, name)
        files = sorted((tmp_path / f"{mesh}_True" / "evaluation" / "in_training").iterdir())
        steps = range(INTERVAL, STEPS + 1, INTERVAL)
        assert [file.name for file in files] == [f"iter_{step:07d}.json" for step in steps]
        scores[mesh] = [metrics_of(json.loads(file.read_text())) for file in files]
        assert found[mesh, True].text.count("evaluation at iteration") == len(files)
        assert scores[mesh][0] != scores[mesh][-1]
        assert scalars(tmp_path / mesh, STEPS) == pytest.approx(scores[mesh][-1])
    for mine, theirs in zip(scores["PP2"], scores["DP2"], strict=True):  # with dropout others are trained
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-5)


def metrics_of(content: dict[str, Any]) -> dict[str, float]:
    tasks = content["tasks"].items()
    return {f"evaluation/{task}/{name}": value for task, one in tasks for name, value in one["metrics"].items()}


def scalars(folder: Path, step: int) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("evaluation/")]
    return {tag: one.value for tag in tags for one in events.Scalars(tag) if one.step == step}


def test_state_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = CudaRNGStatesTracker()
    tracker.states_["of a CUDA graph"] = generator = torch.Generator()
    monkeypatch.setattr(between_steps.tensor_parallel, "get_cuda_rng_tracker", lambda: tracker)
    layer = torch.nn.Linear(2, 2)
    scaling = Namespace(scale=torch.rand(3), amax_history=torch.rand(4, 3))
    layer.fp8_meta = {"scaling_fwd": scaling}
    before = scaling.scale.clone(), scaling.amax_history.clone()

    def draw() -> tuple[float, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator).item()

    with between_steps._unchanged_state([torch.nn.Sequential(layer)]):
        inside = draw()
        scaling.scale += 1
        scaling.amax_history[0] = 7
    assert draw() == inside
    assert torch.equal(scaling.scale, before[0]) and torch.equal(scaling.amax_history, before[1])


def test_a_text_that_is_gone_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words of it")
    tokenizer, tasks = WordTokenizer(), [Phonebook(entries=[3]), LossByPosition(data=f"{tmp_path}/text.txt", length=8)]
    suite = [(task, task.requests(tokenizer)) for task in tasks]
    monkeypatch.setattr(LossByPosition, "summarise", lambda *_: (tmp_path / "gone.txt").read_text())
    monkeypatch.setattr(in_training, "dist", Namespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    reported: list[Any] = []
    monkeypatch.setattr(in_training, "_report", lambda results, *_: reported.append([*results]))
    in_training._evaluate(suite, KnowingBackend(tokenizer), 3)
    assert reported == [["phonebook"]]
    assert "warning: loss_by_position at iteration 3: no result: " in capsys.readouterr().err


EVERY = ("--evaluate-interval", "5")


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--evaluate-suite", "SUITE"), "needs --evaluate-interval"),
        (EVERY, "--evaluate-interval has no effect"),
        (("--evaluate-suite", "none.yaml", *EVERY), "--evaluate-suite none.yaml: there is no such file"),
        (("--evaluate-suite", "SUITE", "--evaluate-interval", "0"), "--evaluate-interval 0 must be at least 1"),
    ],
)
def test_mistakes_in_flags(more: tuple[str, ...], error: str, tmp_path: Path, bpe_folder: Path) -> None:
    suite = str(write_suite(tmp_path))
    with pytest.raises(ValueError, match=error):
        parse_for_job(flags(bpe_folder, *(suite if word == "SUITE" else word for word in more)), 1)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--seq-length", "128"), "task needle has sequences of"),
        (("--tokenizer-type", "NullTokenizer"), "tasks are of text"),
    ],
)
def test_mistakes_in_tasks_end_before_training(
    more: tuple[str, ...], error: str, tmp_path: Path, bpe_folder: Path
) -> None:
    suite = ("--evaluate-suite", str(write_suite(tmp_path)), *EVERY)
    ((code, text),) = run_script(1, *flags(bpe_folder, *suite, *more))
    assert code and text.count("error: ") == 1 and error in text and "lm loss" not in text
