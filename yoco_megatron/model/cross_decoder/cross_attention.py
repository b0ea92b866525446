"""Queries of one cross-decoder layer over the shared K,V (paper equation 3).

Y = X + Attn(RoPE(RMSNorm(X) W_Q), K^, V^) W_O, causal, scale D^-1/2. Position i attends to K^,V^ of positions 0..i.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from yoco_megatron.model.cross_decoder.document_attention import document_attention
from yoco_megatron.model.cross_decoder.shared_kv_reader import SharedReaders
from yoco_megatron.model.cross_decoder.travelling_queries import TravellingQueries
from yoco_megatron.model.cross_decoder.zigzag_attention import is_supported, zigzag_attention
from yoco_megatron.model.layers.chunked_attention import ChunkedAttention
from yoco_megatron.model.layers.norm import head_norm
from yoco_megatron.model.layers.projections import input_projection
from yoco_megatron.model.layers.rotary import rotate
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.parallel.context.query_shard import QueryShard
from yoco_megatron.parallel.context.sequence_shard import SequenceShard


@dataclass
class SharedKVAttentionSubmodules:
    """The parts of cross attention: no K,V projection among them."""

    linear_q: type
    q_norm: type
    core_attention: type
    linear_proj: type


class SharedKVAttention(ChunkedAttention):
    """Mixer [s, b, h] -> [s, b, h] over the shared keys and values; only queries are projected and rotated."""

    linear_in = "linear_q"

    def __init__(
        self,
        config: YOCOConfig,
        submodules: SharedKVAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, attention_type="cross", left_window=None)
        self.linear_q = input_projection(
            submodules.linear_q,
            config,
            config.num_attention_heads * self.head_dim,
            pg_collection.tp,
            bias=config.add_qkv_bias,
        )
        self.q_layernorm = head_norm(submodules.q_norm, config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        attention_bias: SharedReaders,
        rotary_pos_emb: Tensor,
        packed_seq_params: SequenceShard | QueryShard | TravellingQueries,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (normalised), angles [s, 1, 1, D] or [s, b, 1, D] -> (out [s, b, h], no bias).

        K is rotated already, so only q is rotated here. YOCOBlock says what the two borrowed arguments carry.
        """
        kv_reader, shard = attention_bias.kv, packed_seq_params
        assert kv_reader is not None
        query, _ = self.linear_q(hidden_states)
        query = self.q_layernorm(query.unflatten(-1, (-1, self.head_dim)))
        query = rotate(query, rotary_pos_emb, self.config)
        core_reader = kv_reader.inside_checkpoint() if self.recompute_core and self.training else kv_reader

        scale = self.config.softmax_scale or self.head_dim**-0.5

        def attention(query: Tensor) -> Tensor:
            if core_reader.documents is not None:
                core = partial(document_attention, self.core_attention, core_reader)
                return self.checkpoint_core(core, query)
            if isinstance(shard, TravellingQueries):
                return self.checkpoint_core(lambda query: shard.attention(query, core_reader, scale), query)
            if isinstance(shard, SequenceShard) and is_supported(self.config, query, shard):
                return self.checkpoint_core(lambda query: zigzag_attention(query, core_reader, shard, scale), query)
            return self.attend(query, lambda _, cp_chunk, first: core_reader.read(first, cp_chunk.stop), shard)

        store = kv_reader.attention_outputs
        return self.linear_proj(store(self.layer_number, attention, query) if store else attention(query))
