"""The one K,V of the whole model (paper equation 2), or several sets of them (--shared-kv-sets).

K^ = RoPE(RMSNorm_kv(X) W_K),  V^ = RMSNorm_kv(X) W_V, from the self-decoder's output X, or that of one of its layers
(--shared-kv-sources), with a norm of its own. Every cross-decoder layer reads the same tensor, or every layer of a
group; the sets of one source differ in W alone, and with --qk-layernorm, which normalises the heads of K before RoPE,
in the weight of that norm.

Shapes: s sequence, b batch, h hidden, N sets, G K,V heads of this tensor-parallel rank, D head width.
"""

from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from yoco_megatron.config.kv_sets import sources_of
from yoco_megatron.model.layers.norm import head_norm
from yoco_megatron.model.layers.projections import input_projection
from yoco_megatron.model.layers.rotary import rotate
from yoco_megatron.model.yoco_config import YOCOConfig


@dataclass
class SharedKVSubmodules:
    """`linear_kv`, its norm, which is fused into it (`layernorm` is then the identity) or separate, and that of K."""

    linear_kv: type
    k_norm: type
    layernorm: type = IdentityOp


class SharedKV(MegatronModule):
    """Projects the output of one source [s, b, h] to N sets of shared K,V [s, b, G, 2, D], all in one product.

    The rows of W [G * N * 2 * D, h] are ordered by head, inside one head by set, K before V inside one set, so that
    tensor parallelism cuts between heads and a checkpoint fits every mesh. With sequence parallelism the input is
    [s/tp, b, h].
    """

    def __init__(
        self, config: YOCOConfig, submodules: SharedKVSubmodules, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.head_dim = config.kv_channels
        self.layernorm = submodules.layernorm(
            config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        sets = config.shared_kv_sets // len(sources_of(config))
        self.parts = 2 * sets
        self.linear_kv = input_projection(
            submodules.linear_kv,
            config,
            self.parts * config.num_query_groups * self.head_dim,
            pg_collection.tp,
            bias=config.add_qkv_bias,
        )
        self.k_layernorm = nn.ModuleList(head_norm(submodules.k_norm, config) for _ in range(sets))

    def forward(self, hidden_states: Tensor, rotary_pos_emb: Tensor) -> list[Tensor]:
        """hidden_states [s, b, h], angles [s, 1 or b, 1, D] -> each set's K,V [s, b, G, 2, D], K rotated."""
        kv, _ = self.linear_kv(self.layernorm(hidden_states))
        parts_SBGD = kv.unflatten(-1, (-1, self.parts, self.head_dim)).unbind(3)
        return [
            torch.stack((rotate(norm(key_SBGD), rotary_pos_emb, self.config), value_SBGD), dim=3)
            for norm, key_SBGD, value_SBGD in zip(self.k_layernorm, parts_SBGD[::2], parts_SBGD[1::2])
        ]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The norm has the key that the fused layer gives it, so that a checkpoint fits both."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_prefix_mapping(state, {f"{prefix}layernorm.": f"{prefix}linear_kv.layer_norm_"})
        return state
