"""Bytes of a teacher and of its student, and what plans say of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from support.models import batch, build, tiny_config
from support.teachers import MORE, teacher_for_training
from support.worlds import run_world

from yoco_megatron.costs.card import H100
from yoco_megatron.costs.memory import GIB, gpu_memory
from yoco_megatron.distillation import teacher_model
from yoco_megatron.distillation.beside_teacher import YOCOBesideTeacher
from yoco_megatron.distillation.distilled_model import DistilledYOCO
from yoco_megatron.distillation.transfer_model import TransferYOCO
from yoco_megatron.model.yoco_model import YOCOModel
from yoco_megatron.planning import flags
from yoco_megatron.planning.mesh import Plan
from yoco_megatron.planning.search import search
from yoco_megatron.upcycling.teacher import open_teacher

pytest.importorskip("transformers")

# Sizes of tiny_config.
SIZES = "--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 8 --group-query-attention "
SIZES += "--num-query-groups 4 --self-decoder-heads 4 --vocab-size 256 --loss-chunk-size 7 --global-batch-size 16 "
SIZES += "--untie-embeddings-and-output-weights --seq-length 48 --max-position-embeddings 48 --micro-batch-size 2"
TOKENS = 2 * 48
FAMILIES: list[tuple[str, dict[str, Any]]] = [("llama", MORE["llama"]), ("qwen2", {}), ("qwen3", {})]


def planned(*more: str, gpus: int = 1):
    return flags.parse([*SIZES.split(), *more], gpus)[0]


def saved_bytes(model: YOCOModel, *others: torch.Tensor) -> int:
    """For the backward pass, weights left out."""
    kept = {}
    weights = {param.untyped_storage().data_ptr() for param in (*model.parameters(), *others)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens, labels = batch(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, labels=labels)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)


def bytes_of(folders: list[str]) -> list[tuple[int, int, int]]:
    """For each teacher (its weights; what distillation saves more than training; weights that transfer trains)."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    plain = saved_bytes(build(tiny_config(loss_chunk_size=7)))
    found = []
    for folder in folders:
        opened, students = open_teacher(folder), []
        for kind in (DistilledYOCO, TransferYOCO):
            student = build(tiny_config(loss_chunk_size=7), model_class=kind)
            assert isinstance(student, YOCOBesideTeacher)
            student.attach(teacher_model.build(student, opened, groups))
            students.append(student)
        distilled, transfer = students
        weights = {param.data_ptr(): param for param in distilled.teacher.parameters()}  # tied ones once
        saved = saved_bytes(distilled, *weights.values()) - plain
        trained = sum(param.nbytes for param in transfer.parameters() if param.requires_grad)
        found.append((sum(param.nbytes for param in weights.values()), saved, trained))
    return found


def test_bytes_are_those_of_the_models(tmp_path):
    folders = [teacher_for_training(tmp_path / str(n), name, **more) for n, (name, more) in enumerate(FAMILIES)]
    for folder, (weights, saved, trained) in zip(folders, run_world(1, bytes_of, list(map(str, folders)))[0]):
        parts = gpu_memory(planned("--teacher", str(folder))).parts
        assert parts["teacher"] == weights
        assert 0 <= saved - parts["teacher's hidden states"] <= 5 * 4 * TOKENS, "and fp32 sums of each token"
        transfer = gpu_memory(planned("--teacher", str(folder), "--attention-transfer")).parts
        assert transfer["gradients"] == trained
        assert transfer["teacher"] == weights and not transfer["teacher's hidden states"]


def test_every_stage_has_its_part(tmp_path):
    folder = str(teacher_for_training(tmp_path, **MORE["llama"]))
    whole = gpu_memory(planned("--teacher", folder)).parts["teacher"]
    stages = Plan.of(planned("--teacher", folder, "--pipeline-model-parallel-size", "2", gpus=2), H100).memories
    assert sum(memory.parts["teacher"] for memory in stages) == whole + 256 * 48 * 4, "a tied head is a copy there"
    halves = Plan.of(planned("--teacher", folder, "--tensor-model-parallel-size", "2", gpus=2), H100).memory.parts
    assert halves["teacher"] == whole / 2


def test_plans_have_its_time_and_its_mesh(tmp_path):
    folder = str(teacher_for_training(tmp_path, num_hidden_layers=3))
    alone, beside = (Plan.of(planned(*more), H100) for more in ([], ["--teacher", folder]))
    assert beside.time.seconds == pytest.approx(alone.time.seconds + beside.time.parts["teacher"])
    assert beside.time.parts["teacher"] > 0
    two = ["--teacher", folder, "--bf16"]
    with pytest.raises(ValueError, match="has 3 layers, and the student 4: pipeline stages"):
        Plan.of(planned(*two, "--pipeline-model-parallel-size", "2", gpus=2), H100)
    with pytest.raises(ValueError, match="--attention-transfer goes layer by layer"):
        Plan.of(planned(*two, "--attention-transfer"), H100)
    with pytest.raises(ValueError, match=r"--teacher .*config.json is missing"):
        Plan.of(planned("--teacher", str(tmp_path / "none")), H100)
    meshes = search(planned(*two, gpus=8), {}, H100).plans
    assert {plan.args.pipeline_model_parallel_size for plan in meshes} == {1}
    assert max(plan.args.tensor_model_parallel_size for plan in meshes) == 2, "of its two K,V heads"


def test_search_keeps_what_only_transfer_fits(tmp_path):
    """Few weights have gradients and an optimizer: the search discards no mesh for those of all."""
    folder = str(teacher_for_training(tmp_path, **MORE["llama"]))
    wide = ["--teacher", folder, "--bf16", "--ffn-hidden-size", "1024"]
    args = planned(*wide, "--attention-transfer")
    small = replace(H100, memory_gib=2 * Plan.of(args, H100).memory.states / GIB)
    assert search(args, {}, small).plans
    with pytest.raises(ValueError, match="states do not fit"):
        search(planned(*wide), {}, small)
