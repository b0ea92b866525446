"""Sliding-window attention as the mixer of a self-decoder layer (paper section 2.1, equation 4).

Position i attends to positions i - window + 1 .. i of its own document; RoPE on q and k, scale D^-1/2.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from yoco_megatron.model.layers.chunked_attention import ChunkedAttention
from yoco_megatron.model.layers.norm import head_norm
from yoco_megatron.model.layers.projections import input_projection
from yoco_megatron.model.layers.rotary import rotate
from yoco_megatron.model.specs import norm_and_linear, pre_norm_layer
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.parallel.context.halo import keys_with_halo
from yoco_megatron.parallel.context.sequence_shard import CPChunk, SequenceShard


@dataclass
class SlidingWindowSubmodules:
    """The parts of window attention."""

    linear_qkv: type
    qk_norm: type
    core_attention: type
    linear_proj: type


class SlidingWindowAttention(ChunkedAttention):
    """Mixer [s, b, h] -> [s, b, h].

    The rows of `linear_qkv` are ordered by K,V head (its queries, its key, its value), as in Megatron's SelfAttention,
    so that tensor parallelism cuts between heads.
    """

    linear_in = "linear_qkv"

    def __init__(
        self,
        config: YOCOConfig,
        submodules: SlidingWindowSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number,
            pg_collection,
            attention_type="self",
            left_window=config.self_decoder_window - 1,
        )
        self.queries_per_group = config.num_attention_heads // config.num_query_groups
        self.linear_qkv = input_projection(
            submodules.linear_qkv,
            config,
            (config.num_attention_heads + 2 * config.num_query_groups) * self.head_dim,
            pg_collection.tp,
            bias=config.add_qkv_bias,
        )
        self.q_layernorm, self.k_layernorm = (head_norm(submodules.qk_norm, config) for _ in range(2))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: SequenceShard,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (normalised), angles [s, 1, 1, D] or [s, b, 1, D] -> (out [s, b, h], no bias)."""
        shard: SequenceShard = packed_seq_params  # YOCOBlock says why
        qkv, _ = self.linear_qkv(hidden_states)
        qkv = qkv.unflatten(-1, (-1, self.queries_per_group + 2, self.head_dim))
        query, key, value = qkv.split((self.queries_per_group, 1, 1), dim=3)
        query, key, value = self.q_layernorm(query.flatten(2, 3)), self.k_layernorm(key.squeeze(3)), value.squeeze(3)
        query, key = rotate(query, rotary_pos_emb, self.config), rotate(key, rotary_pos_emb, self.config)

        keys_and_values: tuple[Tensor, ...] = (key, value)
        if shard.ranks > 1:
            assert self.left_window is not None
            keys_and_values = keys_with_halo(key, value, self.left_window, shard)

        def keys_of(index: int, cp_chunk: CPChunk, first: int, *keys_and_values: Tensor) -> tuple[Tensor, Tensor]:
            key, value = keys_and_values[2 * index : 2 * index + 2]
            return key[first - cp_chunk.stop :], value[first - cp_chunk.stop :]

        y = self.attend(query, keys_of, shard, *keys_and_values)
        return self.linear_proj(y)


def layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Self-decoder layer with sliding-window attention."""
    norm, linear_qkv = norm_and_linear(backend)
    attention = ModuleSpec(
        module=SlidingWindowAttention,
        submodules=SlidingWindowSubmodules(
            linear_qkv=linear_qkv,
            qk_norm=backend.layer_norm(rms_norm=True, for_qk=True),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
        ),
    )
    return pre_norm_layer(backend, attention, norm, fused_into="linear_qkv")
