"""A mixer is its record: everything else in the system works for one that this folder alone defines."""

import math
from dataclasses import fields, replace

import pytest
from support.cli import parsed, train
from support.models import build, tiny_config
from support.toy_mixer import FIELDS, TOY, main

from yoco_megatron.convert import config_fields
from yoco_megatron.costs.flops import train_flops
from yoco_megatron.costs.memory import gpu_memory
from yoco_megatron.costs.shape import ModelShape, parameter_count
from yoco_megatron.costs.stage_time import part_seconds
from yoco_megatron.costs.traffic import received_bytes
from yoco_megatron.hf.configuration_yoco import LAYER_TYPES, LETTERS
from yoco_megatron.mixers import BUILT_IN, GATED_RETENTION, MIXERS, Mixer, get_mixer, register

TOY_FLAGS = ["--self-decoder", TOY.name, "--save-interval", "10"]
TOLERANCE = 2e-5  # other orders of summation, over ten steps of Adam


def args_of(*flags: str, processes: int = 1):
    return parsed(processes, "--self-decoder", TOY.name, *flags)


def shape_of(*flags: str) -> ModelShape:
    return ModelShape.from_args(args_of(*flags))


def test_trains_saves_and_resumes(tmp_path):
    """To the last printed digit, from the checkpoint of step 10."""
    whole = train(1, *TOY_FLAGS, "--save", str(tmp_path), entry=main)
    assert whole.loss(20) < 0.8 * whole.loss(1)
    resumed = train(1, *TOY_FLAGS, "--load", str(tmp_path), "--ckpt-step", "10", entry=main)
    assert resumed.grad_norms == {step: norm for step, norm in whole.grad_norms.items() if step > 10}
    pipeline = ["--pipeline-model-parallel-size", "2"]
    cut = train(2, *TOY_FLAGS, "--load", str(tmp_path), "--ckpt-step", "10", *pipeline, entry=main)
    assert len(cut.losses) == 10
    assert all(math.isclose(cut.loss(step), whole.loss(step), rel_tol=TOLERANCE) for step in cut.losses)


def test_counts(one_process, monkeypatch):
    """Parameters are those of the module that is built; FLOPs and the planner's seconds follow the record."""
    config = tiny_config(self_decoder=TOY.name)
    mixer = build(config).decoder.layers[0].self_attention
    assert sum(p.numel() for p in mixer.parameters()) == TOY.matmul_parameters(config)
    flops, seconds = train_flops(shape_of(), 1), part_seconds(shape_of())
    monkeypatch.setitem(MIXERS, TOY.name, replace(TOY, mixing_flops=lambda sizes: 1e6))
    assert train_flops(shape_of(), 1) == flops + 3 * 32 * 2 * 1e6  # two layers, 32 tokens
    assert part_seconds(shape_of())["self_decoder"] == pytest.approx(seconds["self_decoder"] + 1e6 / 1e12)


LEFT_OUT = {
    "matmul_parameters": lambda: parameter_count(shape_of()),
    "mixing_flops": lambda: train_flops(shape_of(), 1),
    "flop_rate": lambda: args_of("--pipeline-model-parallel-size", "2", processes=2),
    "stored_bytes": lambda: gpu_memory(args_of()),
    "recomputed_values": lambda: gpu_memory(args_of("--recompute-elementwise")),
    "layer_spec": lambda: build(tiny_config(self_decoder=TOY.name)),
    "init_name": lambda: build(tiny_config(self_decoder=TOY.name)),
    "init_law": lambda: build(tiny_config(self_decoder=TOY.name)),
    "received_bytes": lambda: received_bytes(shape_of(), 2),
    "tensors": lambda: config_fields.from_args(args_of()),
}


@pytest.mark.parametrize("field", LEFT_OUT)
def test_one_clear_error_for_what_a_record_leaves_out(field, monkeypatch, one_process):
    monkeypatch.setitem(MIXERS, TOY.name, Mixer(**FIELDS | {field: None}))
    with pytest.raises(
        ValueError, match=f"is not built for --self-decoder causal_mean, whose record .* has no {field}"
    ):
        LEFT_OUT[field]()


def test_context_parallelism_needs_an_exchange():
    """Refused before anything starts: chunks would not know of each other."""
    with pytest.raises(ValueError, match="--context-parallel-size 2 is not built for --self-decoder causal_mean"):
        args_of("--context-parallel-size", "2", processes=2)


def test_documents_are_separated_or_refused():
    with pytest.raises(
        ValueError, match="--dataloader-inter-document-masking is not built for --self-decoder causal_mean"
    ):
        args_of("--dataloader-inter-document-masking")


@pytest.mark.parametrize("field", [field.name for field in fields(Mixer)])
def test_every_field_is_required(field):
    with pytest.raises(TypeError, match=field):
        Mixer(**{name: value for name, value in FIELDS.items() if name != field})


def test_unknown_and_doubled_names():
    with pytest.raises(ValueError, match=r"gated_retenton is unknown: use one of .*; did you mean gated_retention"):
        get_mixer("gated_retenton")
    with pytest.raises(ValueError, match="two mixers have this name"):
        register(replace(GATED_RETENTION, cache="another"))


def test_exported_folders_know_the_same_mixers():
    """hf/ ships without this package, so it has a table of its own."""
    exported = [mixer for mixer in BUILT_IN if isinstance(mixer.hf_layer_type, str)]
    assert {mixer.name: mixer.hf_layer_type for mixer in exported} == LAYER_TYPES
    assert {mixer.letter: mixer.name for mixer in exported} == LETTERS
