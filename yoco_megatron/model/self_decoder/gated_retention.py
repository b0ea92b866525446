"""Gated retention as the mixer of a self-decoder layer (paper section 3, equations 5-8).

    q_t = R_t(x_t W_q),  k_t = R_t(x_t W_k),  v_t = x_t W_v,  log decay g_t = logsigmoid(x_t w) / tau
    S_t = exp(g_t) S_{t-1} + D^-1/2 k_t^T v_t,  o_t = q_t S_t
    out = (silu(x W_g) * RMS(o)) W_o                    RMS per head, without a weight

Shapes: s sequence, b batch, h hidden, H heads of this tensor-parallel rank, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from yoco_megatron.model.init import Law, xavier
from yoco_megatron.model.layers.head_logits import HeadLogits
from yoco_megatron.model.layers.norm import rms_norm
from yoco_megatron.model.layers.projections import input_projection, output_projection, save_original_input
from yoco_megatron.model.layers.recompute import recompute_in_backward
from yoco_megatron.model.layers.rotary import rotate
from yoco_megatron.model.self_decoder.recurrence import recurrence
from yoco_megatron.model.specs import pre_norm_layer
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.gated_retention import log_decay_from_logits, resolve_backend
from yoco_megatron.parallel.context.sequence_shard import SequenceShard
from yoco_megatron.parallel.context.state_exchange import StateExchange


@dataclass
class GatedRetentionSubmodules:
    """The two large projections; that of the decay is `HeadLogits`."""

    linear_qkvg: type
    linear_proj: type


class GatedRetention(MegatronModule):
    """Mixer [s, b, h] -> [s, b, h]; its input is normalised by TransformerLayer.

    The rows of `linear_qkvg` are ordered by head (q, k, v, gate inside one head), so that tensor parallelism cuts
    between heads. With sequence parallelism input and output are [s/tp, b, h].
    """

    def __init__(
        self,
        config: YOCOConfig,
        submodules: GatedRetentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.head_dim = config.kv_channels
        self.backend = resolve_backend(
            config.retention_backend,
            device=torch.device(torch.cuda.current_device()),
            dtype=config.params_dtype,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
        )
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        width = config.num_attention_heads * self.head_dim
        self.linear_qkvg = input_projection(submodules.linear_qkvg, config, 4 * width, self.tp_group)
        self.linear_proj = output_projection(submodules.linear_proj, config, width, self.tp_group)
        self.linear_decay = HeadLogits(config, config.num_attention_heads, self.tp_group)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        attention_bias: list[Tensor] | None = None,
        rotary_pos_emb: Tensor,
        packed_seq_params: SequenceShard,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (normalised), angles [s, 1, 1, D] or [s, b, 1, D] -> (out [s, b, h], no bias)."""
        shard: SequenceShard = packed_seq_params  # YOCOBlock says why
        qkvg, _ = self.linear_qkvg(hidden_states)
        logits_SBH = self.linear_decay(hidden_states)
        memory = attention_bias
        core = partial(self._core, shard, memory)
        if self.recompute_core and self.training and memory is None:
            y = tensor_parallel.checkpoint(lambda *x: core(*x)[0], False, qkvg, logits_SBH, rotary_pos_emb)
            return self.linear_proj(y)
        y, recompute_into = core(qkvg, logits_SBH, rotary_pos_emb)
        output, bias = self.linear_proj(y)
        if self.config.recompute_elementwise and self.training and torch.is_grad_enabled():
            recompute_in_backward(y, output, recompute_into)
        return output, bias

    def _core(
        self,
        shard: SequenceShard,
        memory: list[Tensor] | None,
        qkvg: Tensor,
        logits_SBH: Tensor,
        rotary_pos_emb: Tensor,
    ) -> tuple[Tensor, Callable[[Tensor], object]]:
        """Projections [s, b, H*4*D] -> (gated, normalised retention y [s, b, H*D], a function that writes y again)."""
        if self.backend.name == "triton" and self.config.rotary_interleaved and memory is None:
            from yoco_megatron.ops.fused.retention_mixer import mix

            recompute_fns: list[Callable[[Tensor], None]] = []
            y = mix(
                qkvg,
                logits_SBH,
                rotary_pos_emb,
                tau=self.config.decay_temperature,
                eps=self.config.layernorm_epsilon,
                document_ids=shard.folded_document_ids,
                in_place=not (self.recompute_core and self.training),
                cp_chunks=len(shard.chunks),
                exchange=partial(StateExchange, shard=shard) if shard.ranks > 1 else None,
                recompute_fns=recompute_fns,
            )
            return y, recompute_fns[0]
        q, k, v, gate = qkvg.unflatten(-1, (-1, 4, self.head_dim)).unbind(3)
        o_SBHD = recurrence(
            lambda: rotate(q, rotary_pos_emb, self.config),
            rotate(k, rotary_pos_emb, self.config),
            v,
            log_decay_from_logits(logits_SBH, self.config.decay_temperature),
            shard,
            self.config,
            self.backend.name,
        )

        if memory is not None:
            memory.append(rms_norm(o_SBHD, self.config.layernorm_epsilon).flatten(2))

        def gated() -> Tensor:
            return (F.silu(gate) * rms_norm(o_SBHD, self.config.layernorm_epsilon)).flatten(2)

        return gated(), lambda out: out.copy_(gated())

    def backward_dw(self) -> None:
        """Compute the delayed weight gradients (called by Megatron's schedules)."""
        self.linear_proj.backward_dw()
        self.linear_qkvg.backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """FP8 with --recompute-modules layernorm: save the norm's input instead of its quantised output."""
        save_original_input(self.linear_qkvg)


def layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Self-decoder layer with gated retention. Its norm is not fused: the decay needs the normalised input too."""
    attention = ModuleSpec(
        module=GatedRetention,
        submodules=GatedRetentionSubmodules(
            linear_qkvg=backend.column_parallel_linear(), linear_proj=backend.row_parallel_linear()
        ),
    )
    return pre_norm_layer(backend, attention, backend.layer_norm(rms_norm=True), fused_into=None)


def init_law(name: str, shape: torch.Size) -> Law | None:
    """The authors' laws: Xavier uniform, gain 2^-2.5 for W_q, W_k, W_v, W_g, each by itself, and the decay; 2^-1 for
    W_o."""
    fan_out, fan_in = shape
    if name == "linear_qkvg.weight":
        return xavier(fan_in, fan_out // 4, gain=2**-2.5)  # four matrices in one
    if name == "linear_decay.weight":
        return xavier(fan_in, fan_out, gain=2**-2.5)
    if name == "linear_proj.weight":
        return xavier(fan_in, fan_out, gain=2**-1)
    return None
