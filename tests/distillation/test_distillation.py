"""--teacher: the teacher computes what transformers computes, and a distilled run is the same at any mesh, with packed
documents and after a resume.

Tolerance: fp32 sums in another order, 2e-6 of the losses in five steps (test_meshes.py).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from support.cli import TINY, Log, Runs
from support.datasets import write
from support.models import assert_close, batch, build, document_batch, tiny_config
from support.teachers import MORE, teacher_for_training
from support.worlds import run_world

from yoco_megatron.data.packing import best_fit, number_of_samples
from yoco_megatron.distillation import teacher_model
from yoco_megatron.distillation.distilled_model import DistilledYOCO
from yoco_megatron.upcycling.teacher import open_teacher

pytest.importorskip("transformers")

TEMPERATURE = 1.5
LENGTH, MOCK = 32, ["--mock-data", "--split", "90,5,5"]
TERMS = ("lm loss", "distillation loss")
TP2, PP2, CP2 = (f"--{name}-parallel-size 2".split() for name in ("tensor-model", "pipeline-model", "context"))
MESHES = {
    "TP2, sequence parallel, packed": [*TP2, "--sequence-parallel"],
    "PP2, packed": PP2,
    "CP2, packed": CP2,
    "TP2, suffix": TP2,
    "PP2 VP2, suffix": [*PP2, "--pipeline-model-parallel-layout", "Et|t|t|tL"],
    "CP2, suffix": CP2,
}
TWICE = {"TP2 PP2, packed": [*TP2, "--sequence-parallel", *PP2], "PP2 CP2, suffix": [*PP2, *CP2]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Its heads are together wider than its hidden state."""
    return teacher_for_training(tmp_path_factory.mktemp("teacher"), head_dim=16)


def beside(folder: str) -> DistilledYOCO:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    opened = open_teacher(folder)
    student = build(tiny_config(loss_chunk_size=7), model_class=DistilledYOCO)
    student.attach(teacher_model.build(student, opened, groups), TEMPERATURE)
    assert not [name for name, _ in student.named_modules() if "teacher" in name]
    return student


def logits_of_teacher(folder: str, documents: bool) -> torch.Tensor:
    model = beside(folder).teacher
    assert not any(param.requires_grad for param in model.parameters())
    with torch.no_grad():
        states = model(batch(2)[0], document_ids=document_batch(2) if documents else None)
        return (states @ model.output_layer.weight.t()).transpose(0, 1)


OF_FAMILIES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama3", MORE["llama3"]),
    ("qwen2", {}),
    ("qwen3", {}),
]


@pytest.mark.parametrize(("family", "fields"), OF_FAMILIES)
def test_the_teacher_is_transformers_model(family, fields, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = teacher_for_training(tmp_path, family, **fields)
    logits = run_world(1, logits_of_teacher, str(folder), False)[0]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(batch(2)[0]).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-4)
    apart = run_world(1, logits_of_teacher, str(folder), True)[0]
    assert (apart - logits).abs().max() > 0.1, "documents are kept apart"


def chunked_and_plain(folder: str) -> list[dict[str, torch.Tensor]]:
    """Both losses and all gradients of their sum: of the model, and from whole logits in plain torch."""
    student = beside(folder)
    tokens, labels = batch(2)
    teacher = student.teacher(tokens) @ student.teacher.output_layer.weight.t()
    found = []
    for is_plain in (False, True):
        student.zero_grad()
        if is_plain:
            logits, wanted = student(tokens), teacher.transpose(0, 1) / TEMPERATURE
            ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
            log_q = F.log_softmax(logits / TEMPERATURE, -1)
            losses = torch.stack((ce, TEMPERATURE**2 * F.kl_div(log_q, wanted.softmax(-1), reduction="none").sum(-1)))
        else:
            losses = student(tokens, labels=labels)
        losses.mul(torch.tensor([0.3, 0.7])[:, None, None]).sum().backward()
        grads = {f"grad/{name}": param.grad.clone() for name, param in student.named_parameters()}
        found.append({"loss": losses.detach()} | grads)
    return found


def test_losses_and_gradients_are_the_plain_ones(teacher):
    assert_close(*run_world(1, chunked_and_plain, str(teacher))[0], loss=1e-6, grad=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[str]]:
    """Flags by the last word of a run's name: documents of which the second half has a loss, several in a sample, or
    each filled up to one; or whole samples, all or a suffix of them with a loss."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(5)
    lengths = generator.integers(3, 20, 10)
    masks = [np.arange(length) >= length // 2 for length in lengths]
    documents = [generator.integers(0, 250, length) for length in lengths]
    packed = write(folder / "packed", documents, loss_masks=masks)
    filled = [np.append(ids, generator.integers(0, 250, LENGTH - len(ids))) for ids in documents]
    apart = write(folder / "apart", filled, loss_masks=[np.append(m, np.zeros(LENGTH - len(m))) for m in masks])
    samples = number_of_samples(best_fit(lengths, LENGTH))
    assert samples <= len(documents) / 2
    validated = ["--valid-data-path", packed, "--calculate-per-token-loss", "--global-batch-size"]
    return {
        "packed": ["--train-data-path", packed, *validated, str(samples)],
        "apart": ["--train-data-path", apart, *validated, str(len(documents))],
        "whole": MOCK,
        "suffix": [*MOCK, "--loss-suffix", "8"],
    }


def losses_of(log: Log) -> dict[tuple[str, int], float]:
    """(term, step) -> loss."""
    return {(term, step): loss for term in TERMS for step, loss in log.of_term(term).items()}


def runs_of(
    world_size: int, teacher: Path, data: dict[str, list[str]], meshes: dict[str, list[str]]
) -> dict[str, dict]:
    """Losses by name, whose last word says of which data."""
    model = [flag for flag in TINY if flag not in MOCK]
    steps = ["--train-iters", "3", "--lr-warmup-iters", "1", "--micro-batch-size", "1"]
    common = [*model, *steps, "--shared-kv-sources", "1", "2", "--teacher", str(teacher)]
    runs = Runs(world_size, {name: [*common, *data[name.split()[-1]], *mesh] for name, mesh in meshes.items()})
    return {name: losses_of(runs[name]) for name in meshes}


@pytest.fixture(scope="module")
def alone(teacher, data, tmp_path_factory) -> dict[str, dict]:
    folder = str(tmp_path_factory.mktemp("run"))
    saved, resumed = ["--save", folder, "--save-interval", "1"], ["--load", folder, "--ckpt-step", "1"]
    return runs_of(
        1, teacher, data, {"packed": saved, "resumed packed": resumed, "apart": [], "whole": [], "suffix": []}
    )


def assert_same(found: dict[str, dict], alone: dict[str, dict]) -> None:
    for name, losses in found.items():
        assert losses == pytest.approx(alone[name.split()[-1]], rel=2e-6), name


def test_packed_documents_are_learnt_as_each_alone(alone):
    assert alone["packed"] == pytest.approx(alone["apart"], rel=2e-6)


def test_a_resumed_run_is_the_same(alone):
    assert alone["resumed packed"] == {key: loss for key, loss in alone["packed"].items() if key[1] != 1}


def test_two_ranks(teacher, data, alone):
    """Also with positions that have no loss, where the teacher's head is left out, too."""
    assert alone["whole"] != pytest.approx(alone["suffix"], rel=1e-3)
    assert_same(runs_of(2, teacher, data, MESHES), alone)


@pytest.mark.slow
def test_four_ranks(teacher, data, alone):
    assert_same(runs_of(4, teacher, data, TWICE), alone)
