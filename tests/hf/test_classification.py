"""The classification head reads each row's last token, wherever padding stands, and trains as all positions would."""

import copy

import pytest
import torch
from support.exported import small_config
from support.models import SELF_DECODERS, relative_error
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification

from yoco_megatron.convert.writers import AUTO_MAP
from yoco_megatron.hf.classification_yoco import YocoForSequenceClassification
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM

LENGTHS, WIDTH = (5, 9), 9
# fp32: the same products of rows in other batches.
TOLERANCE = 2e-6


@pytest.fixture(params=SELF_DECODERS)
def model(request) -> YocoForSequenceClassification:
    torch.manual_seed(2)
    config = small_config(request.param, sliding_window=6, pad_token_id=0, num_labels=3)
    return YocoForSequenceClassification(config).double().eval()


def rows(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of sequences of LENGTHS, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.zeros(2, len(LENGTHS), WIDTH, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        place = slice(WIDTH - length, None) if side == "left" else slice(length)
        ids[row, place] = torch.randint(1, 97, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_is_what_it_is_alone(model, side):
    ids, mask = rows(side)
    labels = torch.tensor([2, 0])
    found = model(ids, attention_mask=mask, labels=labels)
    alone = []
    for row, length in enumerate(LENGTHS):
        states = model.model(ids[row, mask[row] == 1][None], use_cache=False).last_hidden_state
        assert states.shape[1] == length
        alone.append(model.score(states[0, -1]))
    wanted = torch.stack(alone)
    assert relative_error(found.logits, wanted) < TOLERANCE
    assert relative_error(model(ids, attention_mask=mask).logits, wanted) < TOLERANCE
    loss = cross_entropy(wanted, labels)
    assert relative_error(found.loss, loss) < TOLERANCE
    own, other = (torch.autograd.grad(one, list(model.parameters())) for one in (found.loss, loss))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(own, other) if b.abs().max() > 1e-9)


def test_rows_without_a_mask(model):
    ids, mask = rows("right")
    assert relative_error(model(ids).logits[1], model(ids, attention_mask=mask).logits[1]) < TOLERANCE
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"attention_mask, or config\.pad_token_id"):
        model(ids)
    assert model(ids[:1]).logits.shape == (1, 3)


def test_from_a_language_model(tmp_path):
    """The Auto class finds it in a folder, body and all; the head alone is new."""
    import shutil
    from pathlib import Path

    import yoco_megatron.hf

    language = YocoForCausalLM(small_config("gated_retention", auto_map=AUTO_MAP))
    language.save_pretrained(tmp_path)
    for file in Path(yoco_megatron.hf.__file__).parent.glob("*_yoco.py"):
        shutil.copy(file, tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, trust_remote_code=True, num_labels=5, output_loading_info=True
    )
    assert {*info["missing_keys"]} == {"score.weight"} and model.score.weight.shape == (5, 32)
    assert torch.equal(model.model.embed_tokens.weight, language.model.embed_tokens.weight)


def test_targets_are_linear_layers_of_every_kind(monkeypatch):
    """As peft finds them: by the last part of their names."""
    import sys
    import types

    from yoco_megatron.hf import peft_yoco

    table: dict[str, list[str]] = {}
    constants = types.SimpleNamespace(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING=table)
    for name, module in (("peft", types.SimpleNamespace()), ("peft.utils", types.SimpleNamespace())):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "peft.utils.constants", constants)
    peft_yoco.offer_to_peft()
    targets = copy.copy(table["yoco_megatron"])
    for kind in SELF_DECODERS:
        model = YocoForCausalLM(small_config(kind))
        linear = {name.split(".")[-1] for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
        assert linear - {*targets} <= {"lm_head", "decay_proj"} and {"q_proj", "k_proj", "down_proj"} <= {*targets}
    monkeypatch.setitem(sys.modules, "peft.utils.constants", None)
    peft_yoco.offer_to_peft()  # not installed: nothing
