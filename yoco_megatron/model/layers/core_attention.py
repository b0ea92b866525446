"""The plain-torch `core_attention` of Megatron's attention layers, on any device, like Transformer Engine's."""

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from yoco_megatron.ops.attention import causal_attention, packed_causal_attention


class TorchAttention(MegatronModule):
    """Causal attention [s, b, heads, D] -> [s, b, heads * D], windowed if `config.window_size` is set.

    If there are fewer queries than keys, they are the last ones (Transformer Engine's bottom-right masks).

    Raises:
        ValueError: attention dropout or a softmax scale.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        if softmax_scale is not None or config.attention_dropout:
            raise ValueError(
                "--attention-dropout and a softmax scale need Transformer Engine: use --transformer-impl "
                "transformer_engine"
            )
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, b, H, D], key and value [s', b, G, D] -> [s, b, H * D]; always causal, `attention_mask` is ignored.

        With `packed_seq_params`: query [t, H, D], key and value [t', G, D] -> [t, H * D].
        """
        if packed_seq_params is not None:
            packed = packed_seq_params
            out = packed_causal_attention(
                query,
                key,
                value,
                packed.cu_seqlens_q,
                packed.cu_seqlens_kv,
                packed.max_seqlen_q,
                packed.max_seqlen_kv,
                self.window,
            )
            return out.flatten(1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = causal_attention(q, k, v, self.window)
        return out.permute(2, 0, 1, 3).flatten(2)
