"""Mixtures of experts in transformers compute what the trainer's do, for every choice of routing that it accepts.

Tolerances, relative to the norm: float64 1e-8, because both sides round scores to fp32, where what differs in the last
place of float64 may fall to either side; float32 1e-5: sums of the same numbers over other shapes.
"""

import pytest
import torch
from model.test_yoco_model import build_float64, random_batch
from support.exported import twin
from support.models import EXPERTS, SELF_DECODERS, build, relative_error, tiny_config
from transformers import PreTrainedModel

from yoco_megatron.hf import mlp_yoco
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference.engine import Engine

EXACT, CLOSE = 1e-8, 1e-5
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = SIGMOID | {"moe_router_enable_expert_bias": True}
ONE = {"moe_router_topk": 1}
GROUPS = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
ROUTING = {
    "softmax of the chosen": {},
    "softmax of all": {"moe_router_pre_softmax": True},
    "one of softmax": ONE | {"moe_router_pre_softmax": True, "moe_router_dtype": None},
    "sigmoid": SIGMOID,
    "one of sigmoid": SIGMOID | ONE,
    "sqrtsoftplus": {"moe_router_score_function": "sqrtsoftplus"},
    "fp64": {"moe_router_dtype": "fp64"},
    "bias, scaled": BIAS | {"moe_router_topk_scaling_factor": 2.5},
    "groups of logits": GROUPS,
    "groups of softmax": GROUPS | {"moe_router_pre_softmax": True, "moe_router_topk": 1},
    "groups with bias": BIAS | {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "gate of the shared expert": {"moe_shared_expert_gate": True},
    "no shared expert, every other layer": {"moe_shared_expert_intermediate_size": None, "moe_layer_freq": 2},
    "some layers": {"moe_layer_freq": [0, 1, 1, 0]},
}
UNBALANCED = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None}
pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("case", ROUTING)
def test_equals_the_trainer(case: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As do a graph, in which every expert takes every token, and an early exit."""
    kind = SELF_DECODERS[len(case) % 2]
    model = build_float64(True, generator, self_decoder=kind, **EXPERTS | {"num_moe_experts": 8} | ROUTING[case])
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    tokens, _ = random_batch(generator)
    ours = twin(model)
    with torch.no_grad():
        expected = model(tokens)
        assert relative_error(ours(tokens, use_cache=False).logits, expected) < EXACT
        assert relative_error(ours(tokens, logits_to_keep=3).logits, expected[:, -3:]) < EXACT
        monkeypatch.setattr(mlp_yoco, "is_tracing", lambda _: True)
        assert relative_error(ours(tokens, use_cache=False).logits, expected) < EXACT


def test_gradients(generator: torch.Generator) -> None:
    """Those of the trainer without a balancing loss; an expert without tokens has zeros, for data parallelism."""
    trainer = build(tiny_config(**EXPERTS | BIAS | UNBALANCED, moe_shared_expert_gate=True))
    ours = twin(trainer).train()
    tokens, _ = random_batch(generator)
    trainer(tokens[:, :-1], labels=tokens[:, 1:].contiguous()).mean().backward()
    ours(tokens, labels=tokens, use_cache=False).loss.backward()
    pairs = {"model.embed_tokens.weight": "embedding.word_embeddings.weight"}
    for layer, name in ((1, "self_layers.1"), (2, "cross_layers.0")):
        mlp, theirs = f"model.{name}.mlp.", f"decoder.layers.{layer}.mlp."
        pairs[f"{mlp}gate.weight"] = f"{theirs}router.weight"
        pairs[f"{mlp}experts.3.down_proj.weight"] = f"{theirs}experts.local_experts.3.linear_fc2.weight"
        pairs[f"{mlp}shared_expert_gate.weight"] = f"{theirs}shared_experts.gate_weight"
    mine, of_trainer = dict(ours.named_parameters()), dict(trainer.named_parameters())
    for name, theirs in pairs.items():
        assert relative_error(mine[name].grad, of_trainer[theirs].grad) < CLOSE, name
    ours.zero_grad()
    ours(tokens[:1, :2], labels=tokens[:1, :2], use_cache=False).loss.backward()
    lacking = {name for name, parameter in ours.named_parameters() if parameter.grad is None}
    assert lacking == {name for name in mine if name.endswith("e_score_correction_bias")}


@pytest.fixture(params=SELF_DECODERS)
def model(request) -> PreTrainedModel:
    trainer = build(tiny_config(self_decoder=request.param, **EXPERTS | BIAS))
    return twin(trainer)


def test_generation(model: YocoForCausalLM, generator: torch.Generator) -> None:
    """The cache, and our engine with its early exit, against the whole sequence again."""
    tokens, _ = random_batch(generator)
    with torch.no_grad():
        found = model.generate(tokens[:, :9], max_new_tokens=12, output_logits=True, return_dict_in_generate=True)
        expected = model(found.sequences, use_cache=False).logits
        assert relative_error(torch.stack(found.logits, dim=1), expected[:, 8:-1]) < CLOSE
        engine = Engine(model, 64, prefill_chunk=4)
        logits = [engine.prefill(found.sequences[:, :9])]
        logits += [engine.step(token) for token in found.sequences[:, 9:-1].unbind(1)]
    assert relative_error(torch.stack(logits, dim=1), expected[:, 8:-1]) < CLOSE


def test_the_bias_stays_fp32(model: YocoForCausalLM, tmp_path) -> None:
    """16 bits of it would choose other experts."""
    router = model.model.cross_layers[0].mlp.gate
    router.e_score_correction_bias.data.fill_(1 + 2**-20)
    model.save_pretrained(tmp_path)
    loaded = YocoForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    router = loaded.model.cross_layers[0].mlp.gate
    assert router.weight.dtype == torch.bfloat16 and (router.e_score_correction_bias == 1 + 2**-20).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than num_experts 4"),
        ({"moe_layer_freq": [1, 0]}, r"must be 0 or 1 for each of 4 layers"),
        ({"moe_layer_freq": [1, 0, 2, 0]}, r"must be 0 or 1 for each of 4 layers"),
        ({"moe_layer_freq": 0}, "moe_layer_freq 0 must be at least 1"),
        ({"scoring_func": "tanh"}, "scoring_func 'tanh' is unknown"),
        ({"router_dtype": "fp8"}, "router_dtype 'fp8' is unknown"),
        ({"use_expert_bias": True}, "use_expert_bias needs a scoring_func"),
        ({"n_group": 3, "topk_group": 1}, "n_group 3 must divide num_experts 4"),
        ({"topk_group": 1}, "n_group None must divide num_experts 4"),
        ({"n_group": 4, "topk_group": 1}, "num_experts_per_tok 2 must be at least topk_group 1"),
        ({"num_experts": 10**9}, "num_experts 1000000000 in each of 4 layers are above"),
        ({"num_experts": 0}, "num_experts 0 must be a whole number"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor nan must be a number"),
    ],
)
def test_what_describes_no_mixture(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        YocoConfig(num_hidden_layers=4, **{"num_experts": 4} | given)
