"""Queries of one cross-decoder layer over the shared K,V (paper equation 3).

Y = X + Attn(RoPE(RMSNorm(X) W_Q), K^, V^) W_O, causal, scale D^-1/2. Position i sees K^,V^ of positions 0..i.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from yoco_megatron.config.yoco_config import YOCOConfig
from yoco_megatron.model.kv_gradient import SharedKVReader


@dataclass
class SharedKVAttentionSubmodules:
    """The parts of cross attention: no K,V projection among them."""

    linear_q: type
    core_attention: type
    linear_proj: type


class SharedKVAttention(Attention):
    """Megatron's `Attention` whose keys and values are the shared ones; only queries are projected and rotated."""

    def __init__(
        self,
        config: YOCOConfig,
        submodules: SharedKVAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="cross",
            pg_collection=pg_collection,
            name=name,
            **kwargs,
        )
        self.linear_q = submodules.linear_q(
            config.hidden_size,
            self.query_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.pg_collection.tp,
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: SharedKVReader, **_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [s, b, h] -> q [s, b, heads, D], and views of the shared k, v [s, b, G, D]."""
        query, _ = self.linear_q(hidden_states)
        key, value = key_value_states.read()
        return query.unflatten(-1, (-1, self.hidden_size_per_attention_head)), key, value

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attention_bias: SharedKVReader,
        rotary_pos_emb: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`attention_bias` carries the shared K,V; K is rotated already, so only q is here.

        TransformerLayer, and Megatron's full recompute, hand `attention_bias` to the attention untouched. YOCO has no
        bias, so the K,V ride there, and a cross-decoder layer needs no layer class of its own.
        """
        return super().forward(
            hidden_states,
            attention_mask,
            key_value_states=attention_bias,
            rotary_pos_emb=(rotary_pos_emb, None),
            **kwargs,
        )

    def backward_dw(self) -> None:
        """Delayed weight gradients, as Megatron's schedules call them."""
        self.linear_proj.backward_dw()
        self.linear_q.backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """FP8 with --recompute-modules layernorm keeps the norm's input instead of its quantised output."""
        from megatron.core.extensions.transformer_engine import set_save_original_input

        set_save_original_input(self.linear_q)
