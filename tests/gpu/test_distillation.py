"""A teacher beside the student with Transformer Engine: the one that transformers computes, alike at any mesh.

Tolerances of bf16 as in test_meshes.py; of the teacher's loss against transformers' in fp32, 2^-8.
"""

from pathlib import Path

import pytest
import torch
from gpu.test_meshes import FLAGS, SAME_WEIGHTS, TRAINED, WHOLE
from support.cli import Runs
from support.teachers import teacher_for_training

from benchmarks.mesh import Mesh

pytest.importorskip("transformers")
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("all GPUs"), pytest.mark.timeout(560)]
TRANSFER, DISTIL = "attention transfer loss", "distillation loss"
MESHES = ["TP2", "PP2", "CP2", "PP2 VP2"]
LAYERS, VOCABULARY = 4, 1008


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(
        vocab_size=VOCABULARY, num_hidden_layers=LAYERS, hidden_size=256, intermediate_size=512,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return teacher_for_training(tmp_path_factory.mktemp("teacher"), **sizes)


def flags_of(teacher: Path, term: str, mesh: str, *more: str) -> list[str]:
    sizes = (
        f"--num-layers {LAYERS} --vocab-size {VOCABULARY - 1} --num-query-groups 2 --eval-iters 1 --teacher {teacher}"
    )
    transfer = ["--attention-transfer"] if term == TRANSFER else []
    return [*FLAGS.split(), *sizes.split(), *transfer, *Mesh.of(mesh).flags.split(), *more]


@pytest.fixture(scope="module")
def one_gpu(teacher: Path) -> Runs:
    runs = {term: flags_of(teacher, term, "1") for term in (TRANSFER, DISTIL)}
    fp8 = ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"]
    return Runs(1, runs | {"fp8": flags_of(teacher, DISTIL, "1", *fp8)})


@pytest.mark.parametrize("term", [TRANSFER, DISTIL])
def test_it_learns(one_gpu: Runs, term: str) -> None:
    losses = one_gpu[term].of_term(term)
    assert losses[WHOLE] < losses[1]


def test_fp8_student(one_gpu: Runs) -> None:
    """Its first step has the weights of bf16, and the teacher is not quantised."""
    assert one_gpu["fp8"].of_term(DISTIL)[1] == pytest.approx(one_gpu[DISTIL].of_term(DISTIL)[1], rel=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("term", [TRANSFER, DISTIL])
def test_every_mesh_of_two(one_gpu: Runs, teacher: Path, term: str) -> None:
    runs, alone = Runs(2, {mesh: flags_of(teacher, term, mesh) for mesh in MESHES}), one_gpu[term].of_term(term)
    for mesh in MESHES:
        found = runs[mesh].of_term(term)
        assert found[1] == pytest.approx(alone[1], rel=SAME_WEIGHTS), mesh
        assert found == pytest.approx(alone, rel=TRAINED), mesh


def loss_of_teacher(folder: str) -> float:
    """Of random tokens, from Transformer Engine's layers in bf16."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from support.models import BF16, TE, tiny_config

    from yoco_megatron.distillation import teacher_model
    from yoco_megatron.model.yoco_model import YOCOModel
    from yoco_megatron.upcycling.teacher import open_teacher

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = tiny_config(**BF16, **TE, hidden_size=256, num_attention_heads=4, num_query_groups=2)
    student = YOCOModel(config, VOCABULARY, 256, pg_collection=groups)
    model = teacher_model.build(student, open_teacher(folder), groups)
    tokens = random_tokens().cuda()
    with torch.no_grad():
        logits = (model(tokens) @ model.output_layer.weight.t()).transpose(0, 1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).item()


def random_tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 256), generator=torch.Generator().manual_seed(5))


def test_the_teacher_is_transformers_model(teacher: Path) -> None:
    from support.worlds import run_world
    from transformers import AutoModelForCausalLM

    tokens = random_tokens()
    wanted = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)(tokens, labels=tokens).loss.item()
    assert run_world(1, loss_of_teacher, str(teacher))[0] == pytest.approx(wanted, rel=2**-8)
