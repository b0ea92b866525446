"""A trained model ready to generate, from a training checkpoint or an exported folder, without starting Megatron."""

from pathlib import Path
from typing import Any

import torch

from yoco_megatron.checkpoint import architecture
from yoco_megatron.convert import tensor_names, tokenizer_files
from yoco_megatron.convert.readers import Source, open_source
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM
from yoco_megatron.inference.speculative import attach


def is_baseline(folder: str) -> bool:
    """Whether the run in `folder` trained the Transformer baseline."""
    return architecture.read(folder).get("architecture") == "transformer"


def load_baseline(
    folder: str, iteration: int | None = None, tokenizer: str | None = None
) -> tuple[torch.nn.Module, Any, int]:
    """(Megatron's model, its tokenizer or None, its longest sequence), for `UncachedDecoder`."""
    from yoco_megatron.startup.load_run import load_model

    loaded = tokenizer_files.load_of_run(Path(folder), tokenizer)
    model, args = load_model(folder, iteration)
    return model, loaded, args.max_position_embeddings


def load_for_generation(
    folder: str,
    iteration: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    speculative: bool = False,
) -> tuple[YocoForCausalLM, Any]:
    """(model in evaluation mode on `device`, its transformers tokenizer or None, which begins texts as training did).

    Args:
        folder: a run's --save, or the folder of an exported model.
        iteration: which training checkpoint; the latest by default.
        dtype: of the weights; by default as they are stored.
        tokenizer: folder of one to use instead of the model's own.
        speculative: with its layers of multi-token prediction, for `SpeculativeModel`.
    Raises:
        ValueError: no model there, another tokenizer than it was trained with, or no such layers.
    """
    source = find_source(folder, iteration)
    tokenizer_files.choose(source, tokenizer)
    loaded = source.tokenizer and tokenizer_files.load(source.tokenizer, source.document_start)
    return load_weights(source, device, dtype, speculative), loaded


def find_source(folder: str, iteration: int | None = None) -> Source:
    """A run's --save, or the folder of an exported model, for `load_weights`."""
    exported = (Path(folder) / "config.json").exists()
    return open_source("hf" if exported else "megatron", folder, iteration, flag="--load")


def load_weights(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    speculative: bool = False,
) -> YocoForCausalLM:
    """As `load_for_generation`, the model alone."""
    if speculative and not source.config.mtp_num_layers:
        raise ValueError(
            f"--speculative: the model of --load {source.folder} has no layer of multi-token prediction: leave it out, "
            "or train with --mtp-num-layers 1"
        )
    with torch.device("meta"):
        model = YocoForCausalLM(source.config)
        if speculative:
            attach(model)
    state = {
        name: source.load(name).to(device, None if name.endswith(tensor_names.ALWAYS_FP32) else dtype)
        for name in tensor_names.shapes(source.config)
        if speculative or not name.startswith(tensor_names.MULTI_TOKEN)
    }
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    for rotary in (model.model.self_rotary, model.model.cross_rotary):
        rotary.reset(torch.device(device))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval()
