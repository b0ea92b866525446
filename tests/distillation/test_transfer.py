"""--attention-transfer: the loss and its gradients are those of a plain computation with transformers' teacher, one run
is the same at any mesh, what is frozen stays as it was, and a run goes on where it stopped.

Tolerances: transformers' teacher is in fp32, so that the plain loss agrees within its rounding; meshes as in
test_distillation.py.
"""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from support import reference_model
from support.cli import TINY, Runs, checkpoint
from support.models import SELF_DECODERS, assert_close, batch, build, tiny_config
from support.reference_model import Sizes, heads, rms, rope
from support.teachers import teacher_for_training
from support.worlds import run_world

from yoco_megatron.distillation import teacher_model
from yoco_megatron.distillation.transfer_model import TransferYOCO, is_trained
from yoco_megatron.model.init import named_parameters
from yoco_megatron.upcycling.teacher import open_teacher

pytest.importorskip("transformers")

NAME = "attention transfer loss"


def ours(folder: str, kind: str, sources: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Mean loss, gradients by global name, and the weights."""
    opened = open_teacher(folder)
    config = tiny_config(self_decoder=kind, shared_kv_sets=2, shared_kv_sources=[*sources] or None)
    student = build(config, model_class=TransferYOCO)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    student.attach(teacher_model.build(student, opened, groups))
    tokens, labels = batch(2)
    loss = student(tokens, labels=labels).mean()
    loss.backward()
    found = {"loss": loss.detach()}
    for name, param in named_parameters(student):
        found[f"weight/{name}"] = param.detach()
        assert (param.grad is not None) == is_trained(name.replace("retention", "self_attention")), name
        if param.grad is not None:
            found[f"grad/{name}"] = param.grad
    return found


def plain(
    folder: str, kind: str, sources: tuple[int, ...], weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Float64, an equation per line, around transformers' hidden states and attention outputs."""
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    entering, wanted = [], []
    for layer in teacher.model.layers:
        layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
        layer.self_attn.register_forward_hook(lambda _, args, out: wanted.append(out[0]))
    with torch.no_grad():
        teacher(batch(2)[0])
    leaves = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    sizes = Sizes(4, 2, kind, self_heads=4, self_groups=4, heads=8, groups=4, window=7, kv_sets=2, kv_sources=sources)
    w = reference_model.weights_from_yoco(leaves, sizes)
    mixer = {"gated_retention": reference_model.retention, "sliding_window": reference_model.window_attention}[kind]
    losses = []
    for layer in range(4):
        x = rms(entering[layer], sizes.eps) * w[f"{layer}.norm"]
        if layer < 2:
            output, _ = mixer(x, w, str(layer), sizes)
        else:
            of = layer - 2
            source = rms(entering[sizes.source_of_set[of]], sizes.eps) * w[f"kv.{of}.norm"]
            k, v = (heads(source @ w[f"kv.{of}.{m}"].T, sizes.groups) for m in "kv")
            q = rope(heads(x @ w[f"{layer}.q"].T, sizes.heads), sizes)
            output = reference_model.attention(q, rope(k, sizes), v, window=None) @ w[f"{layer}.out"].T
        power = wanted[layer].square().mean()
        losses.append((output - wanted[layer]).square().mean() / (power if power else 1))
    loss = torch.stack(losses).mean()
    loss.backward()
    return {"loss": loss.detach()} | {f"grad/{name}": leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("kind", "sources"), [*((kind, ()) for kind in SELF_DECODERS), (SELF_DECODERS[0], (1, 2))], ids=str
)
def test_equals_a_plain_computation(kind, sources, tmp_path):
    """Of two sets of K,V, both projected from the border, or one from an earlier layer.

    One of the teacher's layers has an attention that adds nothing, to which no error is relative.
    """
    folder = teacher_for_training(tmp_path, hidden_size=64, intermediate_size=96)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["model.layers.1.self_attn.o_proj.weight"].zero_()
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    found = run_world(1, ours, str(folder), kind, sources)[0]
    weights = {name.removeprefix("weight/"): w for name, w in found.items() if name.startswith("weight/")}
    found = {name: value for name, value in found.items() if not name.startswith("weight/")}
    wanted = plain(str(folder), kind, sources, weights)
    assert_close(found, {name: wanted[name] for name in found}, loss=1e-5, grad=1e-4)


TP2, PP2, CP2 = (f"--{name}-parallel-size 2".split() for name in ("tensor-model", "pipeline-model", "context"))
MESHES = {
    "TP2, sequence parallel": [*TP2, "--sequence-parallel"],
    "PP2": PP2,
    "PP2 VP2": [*PP2, "--pipeline-model-parallel-layout", "E|ttt|t|L"],
    "CP2": CP2,
}
TWICE = {"TP2 PP2": [*TP2, "--sequence-parallel", *PP2], "PP2 CP2": [*PP2, *CP2]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return teacher_for_training(tmp_path_factory.mktemp("teacher"), hidden_size=32, intermediate_size=64)


def losses_of(world_size: int, teacher: Path, runs: dict[str, list[str]]) -> dict[str, dict[int, float]]:
    """By name and step; -1, -2: of validation and test."""
    steps = ["--train-iters", "4", "--lr-warmup-iters", "1", "--micro-batch-size", "1"]
    common = [*TINY, *steps, "--teacher", str(teacher), "--attention-transfer", "--shared-kv-sources", "1", "2"]
    done = Runs(world_size, {name: [*common, *flags] for name, flags in runs.items()})
    return {name: done[name].of_term(NAME) for name in runs}


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("run"))
    resumed = ["--load", folder, "--ckpt-step", "2"]
    found = losses_of(1, teacher, {"whole": ["--save", folder, "--save-interval", "2"], "resumed": resumed})
    return found | {"folder": folder}


def test_the_loss_falls_and_only_attention_changes(alone):
    losses = alone["whole"]
    assert losses[4] < losses[1]
    before, after = (checkpoint(alone["folder"], step) for step in (2, 4))
    names = [name for name in before if isinstance(before[name], torch.Tensor) and name.endswith("weight")]
    names = [name for name in names if not name.startswith("optimizer")]
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    assert changed == {name for name in names if is_trained(name)} and changed < set(names)
    moments = [name for name in before if name.startswith("optimizer") and "exp_avg." in name]
    assert {name.split("exp_avg.")[1] for name in moments} == changed, "only what is trained has a state"


def test_a_resumed_run_is_the_same(alone):
    assert alone["resumed"] == {step: loss for step, loss in alone["whole"].items() if step not in (1, 2)}


def test_two_ranks(teacher, alone):
    for name, losses in losses_of(2, teacher, MESHES).items():
        assert losses == pytest.approx(alone["whole"], rel=2e-6), name


@pytest.mark.slow
def test_four_ranks(teacher, alone):
    for name, losses in losses_of(4, teacher, TWICE).items():
        assert losses == pytest.approx(alone["whole"], rel=2e-6), name
