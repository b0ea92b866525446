"""`YOCOConfig`: Megatron's `TransformerConfig` plus what a YOCO model adds (arXiv 2405.05254)."""

import copy
from dataclasses import dataclass
from typing import cast

from megatron.core.transformer.transformer_config import TransformerConfig

from yoco_megatron.config import experts, multi_token
from yoco_megatron.config.resolve import resolve_loss_chunk, resolve_model
from yoco_megatron.config.rules import check_model
from yoco_megatron.config.yoco_fields import YOCOFields


@dataclass
class YOCOConfig(YOCOFields, TransformerConfig):
    """Configuration of a YOCO model.

    `num_attention_heads`, `num_query_groups` and `kv_channels` describe the cross-decoder and the shared K,V;
    `self_decoder_config()` gives the view that self-decoder layers are built from.

    Raises:
        ValueError: sizes that do not fit, naming the flag and the fix.
    """

    # Filled in by __post_init__.
    num_self_decoder_layers: int = cast(int, None)
    self_decoder_heads: int = cast(int, None)
    self_decoder_head_dim: int = cast(int, None)
    self_decoder_query_groups: int = cast(int, None)
    loss_chunk_size: int = cast(int, None)
    shared_kv_sets: int = cast(int, None)

    # Megatron's flags, which its TransformerConfig does not have.
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0

    def __post_init__(self) -> None:
        resolve_model(self)
        resolve_loss_chunk(self)
        check_model(self)
        experts.check_model(self)
        multi_token.check_model(self)
        # Every parameter is drawn after the build, from its name (model/init.py), so that no mesh changes the model.
        self.perform_initialization = False
        super().__post_init__()

    @property
    def num_experts(self) -> int | None:
        """By the name of its flag."""
        return self.num_moe_experts

    @property
    def num_cross_decoder_layers(self) -> int:
        """Layers that read the shared K,V."""
        return self.num_layers - self.num_self_decoder_layers

    @property
    def sends_fp32_kv(self) -> bool:
        """Whether --fp32-kv-transport makes a difference: only if boundaries of pipeline stages are in 16 bits."""
        return self.fp32_kv_transport and self.pipeline_dtype.itemsize == 2

    def self_decoder_config(self) -> "YOCOConfig":
        """The same config with the self-decoder's heads in Megatron's own fields."""
        config = copy.copy(self)
        config.num_attention_heads = self.self_decoder_heads
        config.num_query_groups = self.self_decoder_query_groups
        config.kv_channels = self.self_decoder_head_dim
        return config
