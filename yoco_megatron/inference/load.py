"""A trained model ready to generate, from a training checkpoint or an exported folder, without starting Megatron."""

from pathlib import Path
from typing import Any

import torch

from yoco_megatron.checkpoint import names, tokenizer_files
from yoco_megatron.checkpoint.source import open_source
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM


def load_for_generation(
    folder: str, iteration: int | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[YocoForCausalLM, Any]:
    """(model in evaluation mode on `device`, its transformers tokenizer or None).

    Args:
        folder: a run's --save, or the folder of an exported model.
        iteration: which training checkpoint; the latest by default.
        dtype: of the weights; by default as they are stored.
    Raises:
        ValueError: no model there.
    """
    exported = (Path(folder) / "config.json").exists()
    source = open_source("hf" if exported else "megatron", folder, iteration)
    with torch.device("meta"):
        model = YocoForCausalLM(source.config)
    state = {name: source.load(name).to(device, dtype) for name in names.shapes(source.config)}
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    for rotary in (model.model.self_rotary, model.model.cross_rotary):
        rotary.inv_freq = rotary.compute().to(device)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval(), source.tokenizer and tokenizer_files.load(source.tokenizer)
