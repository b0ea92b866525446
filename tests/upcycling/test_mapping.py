"""Where a YOCO can compute what its teacher computes, it does; elsewhere each tensor is what the rule says."""

import pytest
import torch
from support.models import relative_error
from support.teachers import FAMILIES, save_teacher, small_teacher
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import repeat_kv

from yoco_megatron.convert.readers import Source
from yoco_megatron.convert.verify import unloaded
from yoco_megatron.upcycling.check import check, layer_errors
from yoco_megatron.upcycling.mapping import kv_layers, student, student_config
from yoco_megatron.upcycling.teacher import open_teacher

TOKENS = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(3))
# Everything is in float64 but the norms and the frequencies of transformers' models, which are always in fp32.
TOLERANCE = 1e-6


def made(folder, sets: int = 1, rule: str = "middle", mixer: str = "sliding_window", **more) -> Source:
    teacher = open_teacher(str(folder))
    fields = {"window": 24 if mixer == "sliding_window" else None, "num_self_decoder_layers": None} | more
    return student(teacher, student_config(teacher, mixer, shared_kv_sets=sets, **fields), rule)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_given_their_own_inputs(family, tmp_path):
    """Windows, and cross layers each with a set of its own: every layer is the teacher's."""
    save_teacher(family, tmp_path)
    errors = layer_errors(open_teacher(str(tmp_path)), made(tmp_path, sets=3, num_self_decoder_layers=3), torch.float64)
    assert len(errors) == 6 and max(errors) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_limit_is_the_teacher(family, tmp_path):
    """Windows as long as the sequence, and a set for each cross layer, made of the layer's own input: its logits."""
    teacher = save_teacher(family, tmp_path)
    yoco = unloaded(made(tmp_path, sets=3), torch.float64)
    shared_kv, border = yoco.model.shared_kv, []

    def from_own_input(layer, inputs, options):
        index = list(yoco.model.cross_layers).index(layer)
        border.append(inputs[1:])
        x, rotary = inputs[0], options["rotary"]
        return (x, *shared_kv(x, rotary)[index]), options

    for layer in yoco.model.cross_layers:
        layer.register_forward_pre_hook(from_own_input, with_kwargs=True)
    wanted = teacher.double()(TOKENS).logits
    assert relative_error(yoco(TOKENS, use_cache=False).logits, wanted) < TOLERANCE
    assert len(border) == 3


@torch.no_grad()
@pytest.mark.parametrize("window", [8, 7])
def test_windows_of_the_teacher(window, tmp_path):
    """The lower half of a teacher with windows of 8 is that of a YOCO with windows of 8, however long the text."""
    teacher = save_teacher("mistral", tmp_path, sliding_window=8)
    assert open_teacher(str(tmp_path)).window == 8
    yoco, found = unloaded(made(tmp_path, window=window), torch.float64), []
    yoco.model.cross_layers[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    yoco(TOKENS, use_cache=False)
    wanted = teacher.double()(TOKENS, output_hidden_states=True).hidden_states[3]
    assert (relative_error(found[0], wanted) < TOLERANCE) == (window == 8)


@torch.no_grad()
@pytest.mark.parametrize(("sets", "rule"), [(1, "last"), (3, "first"), (1, "first"), (1, "mean")])
def test_teacher_whose_upper_layers_get_the_border(sets, rule, tmp_path):
    """All but the last layer of the upper half add nothing: K,V from the border are then the last layer's own."""
    teacher = small_teacher("llama")
    for layer in teacher.model.layers[3:5]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    teacher.save_pretrained(tmp_path)
    logits = unloaded(made(tmp_path, sets, rule), torch.float64)(TOKENS, use_cache=False).logits
    error = relative_error(logits, teacher.double()(TOKENS).logits)
    is_own = (sets, rule) in ((1, "last"), (3, "first"))
    assert (error < TOLERANCE) == is_own, error


def test_which_layers_give_their_kv(tmp_path):
    save_teacher("llama", tmp_path)
    config = made(tmp_path).config
    assert [kv_layers(config, rule) for rule in ("first", "middle", "last", "mean")] == [
        [[3]],
        [[4]],
        [[5]],
        [[3, 4, 5]],
    ]
    config = made(tmp_path, sets=2, num_self_decoder_layers=2).config
    assert [kv_layers(config, rule) for rule in ("first", "middle", "last")] == [[[2], [4]], [[3], [5]], [[3], [5]]]
    assert kv_layers(config, "mean") == [[2, 3], [4, 5]]


def test_shared_kv_is_the_rule_s(tmp_path):
    """Two sets of the mean of two layers each: rows by head, inside a head by set; norms in the columns."""
    state = save_teacher("llama", tmp_path).state_dict()
    source = made(tmp_path, sets=2, rule="mean", num_self_decoder_layers=2)
    for name in ("k_proj", "v_proj"):
        found = source.load(f"model.shared_kv.{name}.weight").unflatten(0, (2, 2, 8))
        for index, layers in enumerate(((2, 3), (4, 5))):
            prefixes = [f"model.layers.{layer}." for layer in layers]
            folded = [state[f"{p}self_attn.{name}.weight"] * state[f"{p}input_layernorm.weight"] for p in prefixes]
            torch.testing.assert_close(found[:, index], (sum(folded) / 2).unflatten(0, (2, 8)), rtol=1e-6, atol=1e-7)
    assert torch.equal(source.load("model.shared_kv.norm.weight"), torch.ones(32))


def test_gated_retention(tmp_path):
    """k and v of a group are repeated as transformers repeats them; what is new is zero, and adds nothing."""
    state = save_teacher("llama", tmp_path).state_dict()
    source = made(tmp_path, mixer="gated_retention")
    for name in ("k_proj", "v_proj"):
        rows = state[f"model.layers.1.self_attn.{name}.weight"].unflatten(0, (1, 2, 8))
        repeated = repeat_kv(rows, 2).flatten(0, 2)
        assert torch.equal(source.load(f"model.self_layers.1.mixer.{name}.weight"), repeated)
    for name, rows in (("g_proj", 32), ("decay_proj", 4)):
        assert torch.equal(source.load(f"model.self_layers.2.mixer.{name}.weight"), torch.zeros(rows, 32))
    for name in ("q_proj", "o_proj"):
        assert torch.equal(
            source.load(f"model.self_layers.0.mixer.{name}.weight"), state[f"model.layers.0.self_attn.{name}.weight"]
        )


def test_odd_number_of_layers(tmp_path):
    """Half, rounded down; another split by the flag."""
    teacher = small_teacher("llama", num_hidden_layers=5)
    assert isinstance(teacher, LlamaForCausalLM)
    teacher.save_pretrained(tmp_path)
    assert made(tmp_path).config.num_self_decoder_layers == 2
    assert made(tmp_path, num_self_decoder_layers=4).config.num_self_decoder_layers == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_the_teacher_s(dtype, tmp_path):
    """Rounding once more is no other layer."""
    small_teacher("llama").to(dtype).save_pretrained(tmp_path)
    source = made(tmp_path, mixer="gated_retention")
    assert set(source.dtypes.values()) == {dtype}
    assert all(source.load(name).dtype == dtype for name in source.dtypes)
    assert max(check(open_teacher(str(tmp_path)), made(tmp_path, sets=3), "mean")) > 1e-4
