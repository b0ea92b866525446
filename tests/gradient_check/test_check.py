"""Gradients on a mesh beside one process: right meshes agree, a wrong one is named, all models have tiny flags."""

import os
from importlib import import_module
from unittest import mock

import pytest
import torch
from support.cli import TINY
from support.worlds import spawn

from yoco_megatron.config.yaml_files import to_argv
from yoco_megatron.gradient_check import tiny
from yoco_megatron.gradient_check.check import TOLERANCE, check, compare
from yoco_megatron.gradient_check.mesh import mesh_flags
from yoco_megatron.gradient_check.report import report
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.startup.arguments import parse_for_job
from yoco_megatron.startup.parser import build_parser, parse_flags

CONFIGS = ["yoco_3b", "yoco_3b_mamba2", "yoco_70b_swa", "yoco_moe_3b", "transformer_13b"]
MESHES = ["TP2 SP CP2", "PP2 DP2", "TP4 SP"]


def _main(argv: list[str]) -> None:
    import pretrain_yoco

    pretrain_yoco.main(argv)


def _without_an_all_reduce(argv: list[str]) -> None:
    """Sequence parallelism's: each rank keeps its own part of the gradients of norms."""
    module = import_module("megatron.core.distributed.finalize_model_grads")
    if os.environ["WORLD_SIZE"] == "1":
        return _main(argv)
    with mock.patch.object(module, "_allreduce_non_tensor_model_parallel_grads"):
        return _main(argv)


def _documents_run_on(argv: list[str]) -> None:
    """In the recurrence of a mesh."""
    if os.environ["WORLD_SIZE"] == "1":
        return _main(argv)
    with mock.patch.object(SequenceShard, "folded_document_ids", None):
        return _main(argv)


def test_a_mesh_trains_the_model_of_one_process() -> None:
    flags, ranks = mesh_flags(["CP2"])
    assert ranks is None
    flags += ["--self-decoder-pattern", "GS", "--qk-layernorm", "--z-loss-coeff", "1e-3"]
    flags += ["--dataloader-inter-document-masking"]
    (found,) = spawn(check, 1, (_main, [*TINY, *flags]))
    names = [one.name for one in found]
    assert names[0] == "loss"
    assert any("layers.1" in name and "linear_qkv" in name for name in names)
    assert max(one.error for one in found) < TOLERANCE
    text = report(found, "CP2")
    assert text.endswith(f"all {len(found)} agree within 0.0001: CP2 trains the model of one process")


def test_sequences_have_documents() -> None:
    flags = [*TINY, *mesh_flags(["CP2"])[0], "--self-decoder-pattern", "RS", "--dataloader-inter-document-masking"]
    (found,) = spawn(check, 1, (_documents_run_on, flags))
    assert found[0].is_wrong


def test_a_wrong_gradient_is_named() -> None:
    flags = [*TINY, *mesh_flags(["TP2", "SP"])[0]]
    (found,) = spawn(check, 1, (_without_an_all_reduce, flags))
    wrong = [one.name for one in found if one.is_wrong]
    assert "decoder.layers.0.input_layernorm.weight" in wrong
    assert "decoder.layers.0.mlp.linear_fc2.weight" not in wrong and "loss" not in wrong
    assert f"The first in the forward pass: {wrong[0]} [" in report(found, "TP2 SP")


def test_comparison() -> None:
    reference = {"loss": torch.tensor(2.0), "a": torch.ones(8), "tiny": torch.full((8,), 1e-12)}
    same = {name: value.clone() for name, value in reference.items()}
    rounded = same | {"tiny": torch.full((8,), 2e-12)}  # all of it is rounding
    assert not any(one.is_wrong for one in compare([rounded], reference))
    wrong = same | {"a": torch.ones(8) * torch.tensor([1, 1, 1, 1, 1, 1, 1, float("nan")])}
    found = compare([same, wrong], reference)
    assert [(one.name, one.rank) for one in found if one.is_wrong] == [("a", 1)]
    with pytest.raises(ValueError, match=r"^a: on one side alone"):
        compare([{name: same[name] for name in ("loss", "tiny")}], reference)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_kind_of_model_has_tiny_flags(config: str, mesh: str) -> None:
    """They are those of a run that could start, on the mesh and alone."""
    flags, data_parallel = mesh_flags(mesh.split())
    parser = build_parser()
    if config == "transformer_13b":  # Transformer Engine alone has its context parallelism
        flags = [flag for flag in flags if "context" not in flag]
    args = parse_flags([f"--config=configs/model/{config}.yaml", *flags], parser)
    ranks = args.tensor_model_parallel_size * args.context_parallel_size * args.pipeline_model_parallel_size
    on_mesh, alone = tiny.flags(args, parser, data_parallel or 1)
    parsed = parse_for_job(to_argv(on_mesh, parser), ranks * (data_parallel or 1))[0]
    assert parsed.hidden_size <= 512 and parsed.num_layers == args.num_layers
    alone_parsed = parse_for_job(to_argv(alone, parser), 1)[0]
    assert alone_parsed.global_batch_size == parsed.global_batch_size
    assert {name for name in on_mesh if name not in alone} <= tiny.MESH


def test_bad_input() -> None:
    for words, message in (
        ("TP", "--mesh TP: use TP2, PP2"),
        ("TP0", "--mesh TP0: use TP2"),
        ("DP0", "--mesh DP0: use"),
        ("PP3 PP2", "--mesh PP3 PP2: PP stands there twice"),
        ("SP DP2", "SP is a part of tensor parallelism"),
    ):
        with pytest.raises(ValueError, match=message):
            mesh_flags(words.split())
    parser = build_parser()
    with pytest.raises(ValueError, match="--teacher: gradients are compared without it"):
        tiny.flags(parse_flags(["--teacher", "folder"], parser), parser, 1)
