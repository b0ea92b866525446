"""The same checkpoint at every mesh, and with the caches of one process: equal scores, equal continuations.

Tolerance: fp32 sums in another order, 1e-5 nats.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli import TINY, TINY_BASELINE, TINY_WINDOWS, train
from support.worlds import spawn

from yoco_megatron.evaluation.requests import Generate, Score, TokenLosses
from yoco_megatron.utils.ports import free_port, free_ports

TP2 = {"tensor-model-parallel-size": 2, "sequence-parallel": True}
PP2 = {"pipeline-model-parallel-size": 2}
CP2 = {"context-parallel-size": 2}
VP2 = PP2 | {"num-virtual-stages-per-pipeline-rank": 2}
SMALL, LARGE = 64, 4096  # tokens of a micro-batch: of one sequence, of all
MODELS: dict[str, tuple[list[str], list[tuple[dict[str, Any], int]]]] = {
    "gated retention": (TINY, [(TP2, SMALL), (PP2, SMALL), (VP2, LARGE), (CP2, LARGE), ({}, SMALL), ({}, LARGE)]),
    "sliding window": ([*TINY, *TINY_WINDOWS, "--shared-kv-sets", "2"], [(TP2, LARGE), (PP2, LARGE), (CP2, SMALL)]),
    "Transformer": (TINY_BASELINE, [(TP2, SMALL), (PP2, LARGE), ({}, LARGE)]),
}
WORLD = {"MASTER_ADDR": "127.0.0.1"}


def requests() -> list[list[Any]]:
    """Fresh ids; of all lengths up to that of the model."""
    random = np.random.default_rng(7)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(random.integers(0, 300, count).tolist())

    return [
        [Score(ids(length), (ids(3), ids(1), ids(2))) for length in (5, 40, 5, 90, 1)],
        [TokenLosses(np.array(ids(length)), first) for length, first in ((97, 1), (100, 99), (12, 5))],
        [Generate(ids(length), 7, expected=ids(3), banned=frozenset(ids(9))) for length in (11, 60, 2)]
        + [Generate(ids(20), 1), Generate(ids(20), 5, stop=frozenset(range(150)))],
    ]


def answers(folder: str, **how: Any) -> list[Any]:
    from yoco_megatron.evaluation.backends.load import open_backend

    backend = open_backend(folder, **how)
    score, losses, generate = requests()
    return [*backend.score(score)], [*backend.token_losses(losses)], [*backend.generate(generate)]


def few_steps(folder: Path, tokenizer: Path) -> tuple[str, ...]:
    text = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--vocab-size", "400")
    return (*text, "--train-iters", "4", "--seq-length", "100", "--save", str(folder))


def at_meshes(folder: str, cases: list[dict[str, Any]], ports: list[int]) -> list[Any]:
    """One world of processes, a mesh after the other."""
    from megatron.training.training import destroy_global_state

    found = []
    for how, port in zip(cases, ports):
        os.environ["MASTER_PORT"] = str(port)
        found.append(answers(folder, **how))
        destroy_global_state()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return found


def computed_rows(folder: str) -> list[int]:
    """Positions that the first and the last layer compute, for two choices of 3 and 1 tokens after 90."""
    from yoco_megatron.evaluation.backends.load import open_backend

    backend: Any = open_backend(folder, mesh={})
    rows = [0, 0]

    def count(index: int) -> Any:
        def hook(layer: Any, inputs: Any, named: dict[str, Any]) -> None:
            rows[index] += named["hidden_states"].shape[:2].numel()

        return hook

    layers = backend.chunks[0].decoder.layers
    for index, layer in enumerate((layers[0], layers[-1])):
        layer.register_forward_pre_hook(count(index), with_kwargs=True)
    score = Score(requests()[0][3].context, ((1, 2, 3), (4,)))
    list(backend.score([score]))
    return rows


def test_cross_decoder_runs_where_it_is_asked(tmp_path: Path, bpe_folder: Path) -> None:
    train(1, *few_steps(tmp_path, bpe_folder))
    (rows,) = spawn(computed_rows, 1, (str(tmp_path),), env=WORLD | {"MASTER_PORT": str(free_port())})
    assert rows == [2 * 96, 2 * 32]  # multiples of 32


def assert_equal(found: Any, wanted: Any, case: Any) -> None:
    for mine, theirs in zip(found[0], wanted[0], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5), case
            assert one.is_greedy == other.is_greedy, case
    for mine, theirs in zip(found[1], wanted[1], strict=True):
        assert mine.dtype == np.float32 and np.abs(mine - theirs).max() < 1e-5, case
    assert found[2] == wanted[2], case


@pytest.mark.parametrize("model", MODELS)
def test_equal_on_every_mesh(model: str, tmp_path: Path, bpe_folder: Path) -> None:
    base, meshes = MODELS[model]
    train(1, *few_steps(tmp_path, bpe_folder), base=base)
    one = [dict(mesh=None), dict(mesh={}, token_budget=SMALL)]  # of a YOCO the first has caches
    ((wanted, alone),) = spawn(at_meshes, 1, (str(tmp_path), one, free_ports(2)), env=WORLD)
    assert len({len(new) for new in wanted[2]}) > 2, "no stop"
    assert_equal(alone, wanted, "one process")
    cases = [dict(mesh=mesh, token_budget=budget) for mesh, budget in meshes]
    for found in spawn(at_meshes, 2, (str(tmp_path), cases, free_ports(len(cases))), env=WORLD):
        for case, these in zip(cases, found, strict=True):
            assert_equal(these, wanted, case)
