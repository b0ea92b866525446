"""A random model scores chance on each task, and its losses are those of a uniform guess."""

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exported import small_config

from yoco_megatron.evaluation.backends.cached import CachedBackend
from yoco_megatron.evaluation.driver import answers_of
from yoco_megatron.evaluation.requests import Result
from yoco_megatron.evaluation.suite import make_task
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

VOCAB = 257


class Bytes:
    """A token a byte, and <s>."""

    start, end, banned = (256,), None, frozenset({256})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Any) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def backend() -> CachedBackend:
    torch.manual_seed(5)
    config = small_config("sliding_window", vocab_size=VOCAB, initializer_range=0.02, max_position_embeddings=2048)
    return CachedBackend(YocoForCausalLM(config).eval(), Bytes())


def evaluate(backend: CachedBackend, **settings: Any) -> Result:
    task = make_task(settings)
    assert task.longest(backend.tokenizer) <= backend.max_length
    requests = task.requests(backend.tokenizer)
    answers = list(answers_of(backend, task, requests))
    assert len(answers) == len(requests)
    return task.summarise(answers, backend.tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        dict(task="needle", lengths=[1100], filler="noise", depths=2, samples=2),
        dict(task="multi_needle", lengths=[1100], filler="noise", depths=2, samples=2, needles=2),
        dict(task="ruler", lengths=[1200], samples=2, subtasks=["niah_single_1", "niah_multikey_2", "fwe"]),
        dict(task="phonebook", entries=[4], samples=2, seeds=2),
    ],
    ids=lambda settings: settings["task"],
)
def test_nothing_is_found(backend: CachedBackend, settings: dict[str, Any]) -> None:
    result = evaluate(backend, **settings)
    assert result.chance and all(result.metrics[key] == value == 0 for key, value in result.chance.items())
    assert all(record["answer"] for record in result.records)


def test_choices_are_right_as_often_as_one_in_four(backend: CachedBackend, tmp_path: Path) -> None:
    """Choices of one length: a model without knowledge prefers short ones."""
    rng = random.Random(2)
    folder = tmp_path / "sciq" / "rc_0shot"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"task_config": {"split": "made up"}}')
    lines = [
        {"doc": {}, "idx": index, "doc_id": number, "label": (number * 7 + number // 4) % 4}
        | {"request": {"context": f"Question {number}:", "continuation": f" {rng.randrange(1000, 10000)}"}}
        for number in range(300)
        for index in range(4)
    ]
    (folder / "requests.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    result = evaluate(backend, task="multiple_choice", data=str(tmp_path), benchmarks=["sciq"])
    for key, chance in result.chance.items():
        assert chance == 0.25
        assert result.metrics[key] == pytest.approx(chance, abs=4 * math.sqrt(0.25 * 0.75 / 300))
    assert result.metrics["sciq/bits_per_byte"] == pytest.approx(5 / 4 * math.log2(VOCAB), rel=0.05)


def test_losses_are_a_uniform_guess(backend: CachedBackend, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("Some text, and more of it. " * 20)
    uniform = pytest.approx(math.log(VOCAB), rel=0.03)
    by_position = evaluate(backend, task="loss_by_position", data=str(tmp_path), length=512)
    assert by_position.metrics == {"loss": uniform, "loss_last_bin": uniform}
    assert all(loss == uniform for loss in by_position.curves[0].y[3:])
    by_context = evaluate(backend, task="loss_by_context", data=str(tmp_path), contexts=[8, 400], last=100)
    assert by_context.metrics == {"loss_8": uniform, "loss_400": uniform}
    whole = evaluate(backend, task="validation_loss", data=str(tmp_path), length=100)
    assert whole.metrics["loss"] == uniform
    assert whole.metrics["bits_per_byte"] == pytest.approx(math.log2(VOCAB), rel=0.03)
