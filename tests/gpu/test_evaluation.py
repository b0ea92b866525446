"""Evaluation on one GPU: the caches of one process against Megatron's model in bf16, and training that does not notice.

Tolerance: bf16 kernels see other shapes, 3e-2 nats a token. The model knows the sequences that are continued, so that
its likeliest tokens are far ahead of others.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli import Log, checkpoint, train
from support.evaluation import write_suite
from support.models import SELF_DECODERS
from support.worlds import spawn

from yoco_megatron.evaluation.requests import Generate, Score, TokenLosses
from yoco_megatron.utils.ports import free_port

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

pytestmark = pytest.mark.gpu
BF16 = 3e-2


def flags(tokenizer: Path) -> list[str]:
    model = ("--config", "configs/model/yoco_tiny.yaml", "--seq-length", "512", "--max-position-embeddings", "512")
    text = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--mock-data")
    batch = ("--micro-batch-size", "2", "--global-batch-size", "4", "--log-interval", "1", "--eval-iters", "0")
    return [*model, *text, *batch, "--lr", "1e-3", "--bf16", "--use-distributed-optimizer"]


def requests() -> tuple[list[Score], list[TokenLosses], list[Generate]]:
    random = np.random.default_rng(3)

    def counting(first: int, count: int) -> tuple[int, ...]:  # what Megatron's mock data are
        return tuple(range(first, first + count))

    def ids(count: int) -> tuple[int, ...]:
        return tuple(random.integers(0, 390, count).tolist())

    score = [Score(ids(length), (ids(3), ids(1), ids(9))) for length in (200, 31, 31, 1)]
    losses = [TokenLosses(np.array(ids(length)), first) for length, first in ((512, 1), (300, 290), (40, 5))]
    generate = [Generate(counting(first, length), 12) for first, length in ((3, 150), (20, 150), (5, 170), (100, 40))]
    generate.append(Generate(counting(7, 60), 12, stop=frozenset({75})))
    return score, losses, generate


def answers(folder: str) -> list[tuple[Any, ...]]:
    from yoco_megatron.evaluation.backends.load import open_backend

    found = []
    for how in (dict(mesh=None), dict(mesh=None, token_budget=1), dict(mesh={}), dict(mesh={}, token_budget=512)):
        backend = open_backend(folder, **how)  # type: ignore[arg-type]
        score, losses, generate = requests()
        found.append(([*backend.score(score)], [*backend.token_losses(losses)], [*backend.generate(generate)]))
        if how["mesh"] is not None:
            from megatron.training.training import destroy_global_state

            destroy_global_state()
            torch.distributed.destroy_process_group()
    return found


@pytest.mark.parametrize("kind", SELF_DECODERS)
def test_caches_and_mesh_agree(kind: str, tmp_path: Path, bpe_folder: Path) -> None:
    more = ("--self-decoder", kind, "--train-iters", "150", "--save", str(tmp_path))
    train(1, *more, base=flags(bpe_folder))
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ((wanted, *others),) = spawn(answers, 1, (str(tmp_path),), env=world)
    continued = [list(range(one.prompt[-1] + 1, one.prompt[-1] + 1 + 12)) for one in requests()[2]]
    assert wanted[2][:-1] == continued[:-1] and wanted[2][-1] == list(range(67, 75)), "the model does not count"
    for scores, losses, continuations in others:
        assert continuations == wanted[2]
        for one, mine, theirs in zip(requests()[0], scores, wanted[0], strict=True):
            for choice, found, other in zip(one.continuations, mine, theirs, strict=True):
                assert abs(found.log_probability - other.log_probability) < BF16 * len(choice) * 3
        for mine, theirs in zip(losses, wanted[1], strict=True):
            assert np.abs(mine - theirs).mean() < BF16


OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
TRAININGS = {
    "bf16": OVERLAP,
    "fp8 delayed": (*OVERLAP, "--fp8-format", "hybrid", "--fp8-recipe", "delayed"),
    "fp8 tensorwise": (*OVERLAP, "--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"),
    "graph": (
        *("--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "1"),
        "--no-check-for-nan-in-loss-and-grad",
    ),
}


@pytest.mark.parametrize("training", TRAININGS)
def test_training_does_not_notice(
    training: str, tmp_path: Path, bpe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    own = (*TRAININGS[training], "--train-iters", "6", "--deterministic-mode")
    suite = ("--evaluate-suite", str(write_suite(tmp_path)), "--evaluate-interval", "2")

    def run(name: str, *more: str) -> Log:  # in a process of its own: Megatron keeps a graph for all runs of one
        save = ("--save", str(tmp_path / name), "--save-interval", "6")
        return train(1, *own, *save, *more, base=flags(bpe_folder))

    runs = {"plain": run("plain"), "again": run("again"), "evaluated": run("evaluated", *suite)}
    plain = checkpoint(tmp_path / "plain", 6)
    assert runs["evaluated"].text.count("evaluation at iteration") == 3
    for name in ("again", "evaluated"):
        assert runs[name].losses == runs["plain"].losses and len(runs[name].losses) == 6, name
        found = checkpoint(tmp_path / name, 6)
        for key, value in plain.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, found[key]), (name, key)
    content = json.loads((tmp_path / "evaluated" / "evaluation" / "in_training" / "iter_0000006.json").read_text())
    assert content["tasks"].keys() == {"needle", "multiple_choice", "validation_loss"}
