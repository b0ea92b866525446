"""Gated DeltaNet as the mixer of a self-decoder layer (arXiv 2412.06464; the layer of Qwen3-Next).

    q, k, v = silu(conv(x W_q, x W_k, x W_v)),  q and k of each head divided by their lengths
    beta_t = sigmoid(x_t w_b),  log decay g_t = -exp(A_log) softplus(x_t w_a + dt_bias)
    S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t,  o_t = D^-1/2 q_t S_t
    out = (RMS(o) * silu(x W_g)) W_o                    RMS per head, with one weight for all heads

No rotation: the decay tells positions. Shapes: s sequence, b batch, h hidden, H heads of this tensor-parallel rank,
D head width.
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
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from yoco_megatron.model.init import Law, log_of_uniform, softplus_is_log_uniform, uniform
from yoco_megatron.model.layers.cut_by_head import CutByHead
from yoco_megatron.model.layers.head_logits import HeadLogits
from yoco_megatron.model.layers.norm import RMSNorm, rms_norm, widen
from yoco_megatron.model.layers.projections import input_projection, output_projection, save_original_input
from yoco_megatron.model.layers.recompute import recompute_in_backward
from yoco_megatron.model.layers.short_convolution import WIDTH, ShortConvolution
from yoco_megatron.model.self_decoder.recurrence import over_chunks
from yoco_megatron.model.specs import pre_norm_layer
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.gated_delta import gated_delta, resolve_backend
from yoco_megatron.ops.gated_delta.chunk_state import state_gradient, state_update
from yoco_megatron.ops.recomputed import fused, recomputed
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

LENGTH_EPS = 1e-6
"""Added to the square of a length, as in flash-linear-attention and transformers."""
DECAYS = 0.01, 16.0
"""exp(A_log) of a new model is uniform between these."""
STEPS = 1e-3, 1e-1
"""softplus(dt_bias) of a new model is log-uniform between these, as in the authors' code."""


@dataclass
class GatedDeltaNetSubmodules:
    """The two large projections; those of beta and of the decay are `HeadLogits`."""

    linear_qkvg: type
    linear_proj: type


class GatedDeltaNet(CutByHead):
    """Mixer [s, b, h] -> [s, b, h]; its input is normalised by TransformerLayer.

    The rows of `linear_qkvg` are ordered by head (q, k, v, gate inside one head), and so are the channels of the
    convolution, so that tensor parallelism cuts between heads. With sequence parallelism input and output are
    [s/tp, b, h].
    """

    def __init__(
        self,
        config: YOCOConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config, pg_collection.tp)
        self.layer_number = layer_number
        heads, self.head_dim = config.num_attention_heads, config.kv_channels
        width = heads * self.head_dim
        backend = resolve_backend(
            config.gated_delta_backend,
            device=torch.device(torch.cuda.current_device()),
            dtype=config.params_dtype,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
        )
        self.op = partial(gated_delta, backend=backend.name)
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        self.linear_qkvg = input_projection(submodules.linear_qkvg, config, 4 * width, self.tp_group)
        self.linear_proj = output_projection(submodules.linear_proj, config, width, self.tp_group)
        self.linear_ba = HeadLogits(config, 2 * heads, self.tp_group)  # beta and decay, by head
        self.conv = ShortConvolution(config, 3 * width, self.tp_group, bias=False)
        self.norm = RMSNorm(config, self.head_dim)
        # Its gradient is summed over tensor-parallel ranks, which have other heads, in `_core`, and not by Megatron.
        self.norm.weight.sequence_parallel = False  # type: ignore[attr-defined]
        self.A_log, self.dt_bias = self.parameter(heads), self.parameter(heads)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        attention_bias: list[Tensor] | None = None,
        packed_seq_params: SequenceShard,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (normalised) -> (out [s, b, h], no bias)."""
        shard: SequenceShard = packed_seq_params  # YOCOBlock says why
        qkvg, _ = self.linear_qkvg(hidden_states)
        logits = self.linear_ba(hidden_states)
        memory = attention_bias
        core = partial(self._core, shard, memory)
        if self.recompute_core and self.training and memory is None:
            y = tensor_parallel.checkpoint(lambda *x: core(*x)[0], False, qkvg, logits)
            return self.linear_proj(y)
        y, recompute_into = core(qkvg, logits)
        output, bias = self.linear_proj(y)
        if self.config.recompute_elementwise and self.training and torch.is_grad_enabled():
            recompute_in_backward(y, output, recompute_into)
        return output, bias

    def _core(
        self, shard: SequenceShard, memory: list[Tensor] | None, qkvg: Tensor, logits: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], object]]:
        """Projections [s, b, H*4*D], [s, b, 2*H] -> (gated, normalised y [s, b, H*D], a function that writes y)."""
        qkv, gate = qkvg.unflatten(-1, (-1, 4, self.head_dim)).split((3, 1), dim=3)
        qkv, gate = self.conv(qkv.flatten(2), shard), gate.squeeze(3).contiguous()  # the projection's output can go
        q, k, v = qkv.unflatten(-1, (-1, 3, self.head_dim)).unbind(3)
        of_beta, of_decay = widen(logits).unflatten(-1, (-1, 2)).unbind(-1)
        log_decay = -widen(self.A_log).exp() * F.softplus(of_decay + widen(self.dt_bias))
        o = over_chunks(
            self.op,
            partial(state_update, self.op),
            partial(state_gradient, self.op),
            shard,
            lambda: recomputed(_of_length_one, q),
            recomputed(_of_length_one, k),
            v,
            log_decay,
            of_beta.sigmoid(),
        )
        weight = tensor_parallel.copy_to_tensor_model_parallel_region(self.norm.weight, group=self.tp_group)
        inputs, eps = (o, gate, weight), self.config.layernorm_epsilon
        y = recomputed(_gated_norm, *inputs, eps=eps)
        if memory is not None:
            memory.append(recomputed(_norm, o, weight, eps=eps))
        return y, lambda out: out.copy_(fused(_gated_norm, out.is_cuda)(*inputs, eps=eps))

    def backward_dw(self) -> None:
        """Compute the delayed weight gradients (called by Megatron's schedules)."""
        self.linear_proj.backward_dw()
        self.linear_qkvg.backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """FP8 with --recompute-modules layernorm: save the norm's input instead of its quantised output."""
        save_original_input(self.linear_qkvg)


def _of_length_one(x: Tensor) -> Tensor:
    """[s, b, H, D], each head divided by its length; in x's dtype."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + LENGTH_EPS)).to(x.dtype)


def _gated_norm(o: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """o, gate [s, b, H, D], weight [D] -> RMS(o) weight * silu(gate), [s, b, H*D]."""
    return (widen(_norm(o, weight, eps)) * F.silu(widen(gate)).flatten(2)).to(o.dtype)


def _norm(o: Tensor, weight: Tensor, eps: float) -> Tensor:
    """o [s, b, H, D], weight [D] -> RMS(o) weight, [s, b, H*D]."""
    return (rms_norm(o, eps) * weight).flatten(2)


def layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Self-decoder layer with gated DeltaNet. Its norm is not fused: beta and the decay need the normalised input."""
    mixer = ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            linear_qkvg=backend.column_parallel_linear(), linear_proj=backend.row_parallel_linear()
        ),
    )
    return pre_norm_layer(backend, mixer, backend.layer_norm(rms_norm=True), fused_into=None)


def init_law(name: str, shape: torch.Size) -> Law | None:
    """Those of the authors' code for what is no matrix; of matrices the law of every other one."""
    if name.startswith("conv."):
        return uniform(WIDTH**-0.5)
    return {"A_log": log_of_uniform(*DECAYS), "dt_bias": softplus_is_log_uniform(*STEPS)}.get(name)
