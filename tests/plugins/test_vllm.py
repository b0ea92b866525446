"""The vLLM plugin, without vLLM: what it computes from vLLM's description of a step, and what it tells vLLM.

With vLLM, plugins/vllm/check.py compares generated tokens.
"""

import ast
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yoco_vllm
from support.models import relative_error
from yoco_vllm.states import retain

from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.ops.gated_retention.reference import recurrent

PLUGIN = Path(yoco_vllm.__file__).parents[1]
H, D, LENGTHS, SLOTS = 3, 8, (37, 1, 150, 20, 9), 9


@dataclass
class Batch:
    num_decodes: int
    num_prefills: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    state_indices_tensor: torch.Tensor


class Scheduler:
    """Takes random pieces of some sequences, as vLLM orders them: those of one token first."""

    def __init__(self, draw: torch.Generator):
        self.draw, self.done = draw, [0] * len(LENGTHS)
        self.slots = 1 + torch.randperm(SLOTS - 1, generator=draw)[: len(LENGTHS)]  # slot 0 is vLLM's own

    def below(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.draw))

    def steps(self):
        while left := [i for i in range(len(LENGTHS)) if self.done[i] < LENGTHS[i]]:
            taken = {
                i: min(LENGTHS[i] - self.done[i], 1 + self.below(2) * self.below(60)) for i in left if self.below(3)
            }
            order = sorted(taken, key=lambda i: taken[i] > 1)
            if order:
                pieces = [slice(self.done[i], self.done[i] + taken[i]) for i in order]
                for i in order:
                    self.done[i] += taken[i]
                yield list(zip(order, pieces)), self.describe(order, taken)

    def describe(self, order: list[int], taken: dict[int, int]) -> Batch:
        decodes = sum(taken[i] == 1 for i in order)
        starts = torch.tensor([0, *(taken[i] for i in order)]).cumsum(0)
        seen = torch.tensor([self.done[i] for i in order])
        return Batch(decodes, len(order) - decodes, starts, seen, self.slots[order])


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


def test_vllm_is_told_of_the_exported_architecture(monkeypatch):
    """Once, however often vLLM asks, by the name in an exported config.json; and that windows are no hybrid."""
    models: dict[str, str] = {}
    registry = SimpleNamespace(get_supported_archs=models.keys, register_model=models.__setitem__)
    configs: dict[str, type] = {}
    modules = {
        "vllm": {"ModelRegistry": registry},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": configs, "VerifyAndUpdateConfig": object},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    entry = project["entry-points"]["vllm.general_plugins"]["yoco"]
    assert entry == "yoco_vllm:register"
    yoco_vllm.register()
    yoco_vllm.register()
    file, _, name = models.pop(YocoForCausalLM.__name__).removeprefix("yoco_vllm.").partition(":")
    assert not models
    classes = [
        n.name
        for n in ast.walk(ast.parse((PLUGIN / f"yoco_vllm/{file}.py").read_text()))
        if isinstance(n, ast.ClassDef)
    ]
    assert name in classes
    for kind, types in (
        ("sliding_window", {"full_attention"}),
        ("gated_retention", {"linear_attention", "full_attention"}),
    ):
        config = SimpleNamespace(
            self_decoder=kind, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
        )
        configs[YocoForCausalLM.__name__].verify_and_update_model_config(SimpleNamespace(hf_config=config))
        assert set(config.layer_types) == types and len(config.layer_types) == 2
