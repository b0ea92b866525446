"""Small Transformers of the families that can be upcycled, as their users have them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")
# Of each family what the other has not: tied embeddings, another theta.
MORE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    # Heads of width 8 have one frequency that is divided, and one that is in between.
    "llama3": {
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3": {"head_dim": 16},  # its heads are together wider than its hidden state
    "mistral": {"sliding_window": None, "rms_norm_eps": 1e-5},
}


def small_teacher(family: str, **more: Any) -> nn.Module:
    """Six layers of width 32, with weights, those of norms too, that let layers differ."""
    sizes = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    config = CONFIG_MAPPING["llama" if family == "llama3" else family](**sizes | MORE.get(family, {}) | more)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + (parameter.ndim == 1))
    return model.eval()


def save_teacher(family: str, folder: Path, **more: Any) -> Any:
    """`small_teacher`, and its folder."""
    model: Any = small_teacher(family, **more)
    model.save_pretrained(folder)
    return model


def teacher_for_training(folder: Path, family: str = "llama", **more: Any) -> Path:
    """A model of the vocabulary and number of layers of small training runs in `folder`, which is returned."""
    sizes: dict[str, Any] = dict(vocab_size=256, num_hidden_layers=4, hidden_size=48, tie_word_embeddings=False)
    save_teacher(family, folder, **sizes | more)
    return folder
