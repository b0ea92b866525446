"""The vLLM plugin, without vLLM: what it computes from vLLM's description of a step, and what it tells vLLM.

With vLLM, plugins/vllm/check.py compares generated tokens.
"""

import ast
import sys
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yoco_vllm
from support.models import relative_error
from support.vllm_steps import LENGTHS, SLOTS, Batch, Scheduler
from yoco_vllm.states import retain

from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.ops.gated_retention.reference import recurrent

PLUGIN = Path(yoco_vllm.__file__).parents[1]
H, D = 3, 8


def random_inputs(generator: torch.Generator, length: int) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.randn(length, H, D, dtype=torch.float64, generator=generator) for _ in range(3))
    return q, k, v, -torch.rand(length, H, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_many_sequences_equal_whole_ones(generator, seed):
    """Whatever the schedule, in slots that hold nothing of use at first."""
    generator.manual_seed(generator.initial_seed() + seed)
    whole = [random_inputs(generator, length) for length in LENGTHS]
    states = torch.full((SLOTS, H, D, D), torch.nan, dtype=torch.float64)
    found = [torch.zeros(length, H, D, dtype=torch.float64) for length in LENGTHS]
    for pieces, batch in Scheduler(generator).steps():
        parts = (torch.cat([whole[i][part][piece] for i, piece in pieces]) for part in range(4))
        out = retain(*parts, states, batch)
        for (i, piece), rows in zip(pieces, out.split(batch.query_start_loc.diff().tolist())):
            found[i][piece] = rows
    for inputs, o in zip(whole, found):
        wanted, _ = recurrent(*(x[None] for x in inputs))
        assert relative_error(o, wanted[0]) < 1e-12  # float64


@pytest.mark.parametrize("padding_slot", [-1, 0])
def test_padding_is_nobodys(generator, padding_slot):
    """Rows and sequences that fill a batch up, as CUDA graphs need, change no sequence, and no state but vLLM's own."""
    q, k, v, g = random_inputs(generator, 3)
    before = torch.randn(SLOTS, H, D, D, dtype=torch.float64, generator=generator)
    batch = Batch(3, 0, torch.arange(4), torch.tensor([5, 1, 8]), torch.tensor([8, 2, 4]))
    states, padded_states = before.clone(), before.clone()
    wanted = retain(q, k, v, g, states, batch)
    padded = replace(
        batch,
        num_decodes=5,
        query_start_loc=torch.tensor([0, 1, 2, 3, 3, 3]),
        seq_lens=torch.tensor([5, 1, 8, 0, 0]),
        state_indices_tensor=torch.tensor([8, 2, 4, padding_slot, padding_slot]),
    )
    rows = (torch.cat([x, x[:3]]) for x in (q, k, v, g))
    found = retain(*rows, padded_states, padded)
    assert torch.equal(found[:3], wanted) and not found[5:].any()
    assert torch.equal(padded_states[1:], states[1:])
    untouched = [i for i in range(1, SLOTS) if i not in (8, 2, 4)]
    assert torch.equal(states[untouched], before[untouched])


@pytest.fixture
def vllm(monkeypatch) -> SimpleNamespace:
    """A stand-in for vLLM's registries, and what was written there."""
    told = SimpleNamespace(models=[], configs={}, warnings=[])
    registry = SimpleNamespace(
        get_supported_archs=lambda: [name for name, _ in told.models],
        register_model=lambda name, where: told.models.append((name, where)),
    )
    logger = SimpleNamespace(warning=lambda text, *words: told.warnings.append(text % words))
    modules = {
        "vllm": {"ModelRegistry": registry, "__version__": "0.32.0"},
        "vllm.logger": {"init_logger": lambda name: logger},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": told.configs, "VerifyAndUpdateConfig": object},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_vllm_is_told_of_the_exported_architecture(vllm):
    """Once, however often vLLM asks, by the name in an exported config.json."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"yoco": "yoco_vllm:register"}
    yoco_vllm.register()
    yoco_vllm.register()
    [(architecture, where)] = vllm.models
    assert architecture == YocoForCausalLM.__name__ and not vllm.warnings
    module, _, name = where.partition(":")
    tree = ast.parse((PLUGIN / f"{module.replace('.', '/')}.py").read_text())
    assert name in [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def test_another_vllm_is_warned_of(vllm, monkeypatch):
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.40.1")
    yoco_vllm.register()
    assert vllm.warnings == ["yoco-vllm is for vLLM 0.32 and 0.33, this is 0.40.1: run its check.py"]


@pytest.mark.parametrize("kind", ["sliding_window", "gated_retention"])
def test_windows_are_no_hybrid(vllm, kind):
    """vLLM gives a hybrid's layers states, and takes for one what has layers of other names than these."""
    yoco_vllm.register()
    config = YocoConfig(self_decoder=kind)
    vllm.configs[YocoForCausalLM.__name__].verify_and_update_model_config(SimpleNamespace(hf_config=config))
    hybrid = not all(name in ("attention", "full_attention") for name in config.layer_types)
    assert hybrid == (kind == "gated_retention") and len(config.layer_types) == config.num_hidden_layers


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"self_decoder": "mamba2"}, "sliding_window or gated_retention, not self_decoder mamba2"),
        ({"self_decoder": "RSR"}, "not self_decoder RSR"),
        ({"num_experts": 4}, "does not serve num_experts 4"),
        ({"shared_kv_sources": [2]}, r"does not serve shared_kv_sources \[2\]"),
        ({"cross_decoder_pattern": "AGAG"}, "does not serve cross_decoder_pattern AGAG"),
        ({"mtp_num_layers": 1, "qk_norm": True, "shared_kv_sets": 4}, None),
    ],
)
def test_models_that_it_would_not_compute_are_refused_at_the_start(vllm, fields, said):
    """Before vLLM starts its processes."""
    yoco_vllm.register()
    sizes = {"mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_state_dim": 8, "mamba_num_groups": 2}
    few = {"num_hidden_layers": 7, "num_self_decoder_layers": 3} | (sizes if "mamba2" in fields.values() else {})
    config = YocoConfig(**few | fields)
    hook = vllm.configs[YocoForCausalLM.__name__].verify_and_update_model_config
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        hook(SimpleNamespace(hf_config=config))
