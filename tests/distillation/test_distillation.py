"""--teacher: the teacher computes what transformers computes, and a distilled run is the same at any mesh.

Tolerance: fp32 sums in another order, 2e-6 of the losses in five steps (test_meshes.py).
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from support.cli import TINY, Log, Runs
from support.models import assert_close, batch, build, document_batch, tiny_config
from support.teachers import MORE, teacher_for_training
from support.worlds import run_world

from yoco_megatron.distillation import teacher_model
from yoco_megatron.distillation.distilled_model import DistilledYOCO
from yoco_megatron.upcycling.teacher import open_teacher

pytest.importorskip("transformers")

TEMPERATURE = 1.5
STEPS = 3
TERMS = ("lm loss", "distillation loss")
TP2, PP2, CP2 = (f"--{name}-parallel-size 2".split() for name in ("tensor-model", "pipeline-model", "context"))
MESHES = {
    "TP2, sequence parallel": [*TP2, "--sequence-parallel"],
    "PP2": PP2,
    "CP2": CP2,
    "TP2, suffix": TP2,
    "PP2 VP2, suffix": [*PP2, "--pipeline-model-parallel-layout", "Et|t|t|tL"],
    "CP2, suffix": CP2,
}
TWICE = {"TP2 PP2": [*TP2, "--sequence-parallel", *PP2], "PP2 CP2, suffix": [*PP2, *CP2]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Its heads are together wider than its hidden state."""
    return teacher_for_training(tmp_path_factory.mktemp("teacher"), head_dim=16)


def beside(folder: str) -> DistilledYOCO:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    opened = open_teacher(folder)
    student = build(tiny_config(loss_chunk_size=7), model_class=DistilledYOCO)
    student.attach(teacher_model.build(student, opened, groups), TEMPERATURE, opened.config.vocab_size)
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


def flags_of(teacher: Path, *more: str) -> list[str]:
    steps = ["--train-iters", str(STEPS), "--lr-warmup-iters", "1", "--micro-batch-size", "1"]
    return [*TINY, *steps, "--teacher", str(teacher), *more]


def losses_of(log: Log) -> dict[tuple[str, int], float]:
    """(term, step) -> loss."""
    return {(term, step): loss for term in TERMS for step, loss in log.of_term(term).items()}


def runs_of(world_size: int, teacher: Path, meshes: dict[str, list[str]]) -> dict[str, dict]:
    """Losses by name; where that says suffix, of the last positions alone."""
    suffix = {name: ["--loss-suffix", "8"] if name.endswith("suffix") else [] for name in meshes}
    runs = Runs(world_size, {name: flags_of(teacher, *mesh, *suffix[name]) for name, mesh in meshes.items()})
    return {name: losses_of(runs[name]) for name in meshes}


@pytest.fixture(scope="module")
def alone(teacher) -> dict[str, dict]:
    return runs_of(1, teacher, {"whole": [], "suffix": []})


def assert_same(found: dict[str, dict], alone: dict[str, dict]) -> None:
    for name, losses in found.items():
        wanted = alone["suffix" if name.endswith("suffix") else "whole"]
        assert losses == pytest.approx(wanted, rel=2e-6), name


def test_two_ranks(teacher, alone):
    """Also with positions that have no loss, where the teacher's head is left out, too."""
    assert alone["whole"] != pytest.approx(alone["suffix"], rel=1e-3)
    assert_same(runs_of(2, teacher, MESHES), alone)


@pytest.mark.slow
def test_four_ranks(teacher, alone):
    assert_same(runs_of(4, teacher, TWICE), alone)
