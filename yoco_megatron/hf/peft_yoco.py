"""The linear layers that LoRA adapts where its user names none, by model type in a table of peft's."""

from .configuration_yoco import YocoConfig

TARGETS = [
    *("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"),
    *("z_proj", "x_proj", "B_proj", "C_proj"),
    *("gate_proj", "up_proj", "down_proj"),
    *("in_proj", "out_proj"),
]
"""All but the head, and small projections to logits of heads."""


def offer_to_peft() -> None:
    """Enter `TARGETS` into peft's table, where peft is installed."""
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
    except Exception:  # not installed, or it does not fit the other packages, which is for its user to see
        return
    table.setdefault(YocoConfig.model_type, TARGETS)
