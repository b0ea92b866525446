"""Mamba-2 as the mixer of a self-decoder layer (arXiv 2405.21060).

    z, x, B, C = u_t W,  (x, B, C) = silu(conv(x, B, C)),  dt = softplus(u_t w + dt_bias),  decay g_t = -exp(A_log) dt
    S_t = exp(g_t) S_{t-1} + B_t^T (dt x_t),  o_t = C_t S_t + D x_t
    out = RMS(o * silu(z)) W_o                          RMS over each group of heads, with a weight

The recurrence is that of gated retention with C, B and dt x in place of q, k and v, unscaled.

Shapes: s sequence, b batch, h hidden; of this tensor-parallel rank G groups, H heads; N state width, P head width.
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
from yoco_megatron.model.layers.norm import rms_norm, widen
from yoco_megatron.model.layers.projections import input_projection, output_projection, save_original_input
from yoco_megatron.model.layers.recompute import recompute_in_backward
from yoco_megatron.model.layers.short_convolution import WIDTH, ShortConvolution
from yoco_megatron.model.self_decoder.recurrence import recurrence
from yoco_megatron.model.specs import pre_norm_layer
from yoco_megatron.model.yoco_config import YOCOConfig
from yoco_megatron.ops.gated_retention import resolve_backend
from yoco_megatron.ops.recomputed import fused, recomputed
from yoco_megatron.parallel.context.sequence_shard import SequenceShard

DECAYS = 1.0, 16.0
"""-A of a new model is uniform between these."""
STEPS = 1e-3, 1e-1
"""dt of a new model without its input is log-uniform between these, as in the authors' code."""


@dataclass
class Mamba2Submodules:
    """The two large projections; that of the steps is `HeadLogits`."""

    linear_zxBC: type
    linear_proj: type


class Mamba2(CutByHead):
    """Mixer [s, b, h] -> [s, b, h]; its input is normalised by TransformerLayer.

    The rows of `linear_zxBC` are ordered by group (z, x of its heads, B, C), and so are the channels of the convolution
    and of the norm, so that tensor parallelism cuts between groups. With sequence parallelism input and output are
    [s/tp, b, h].
    """

    def __init__(
        self,
        config: YOCOConfig,
        submodules: Mamba2Submodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config, pg_collection.tp)
        self.layer_number = layer_number
        heads, groups, state = config.mamba_num_heads, config.mamba_num_groups, config.mamba_state_dim
        assert heads is not None  # config.resolve
        self.head_dim = config.mamba_head_dim
        width = heads * self.head_dim
        # Of one group: z, and what goes through the convolution, x, B and C.
        self.group_parts = width // groups, state, state
        self.backend = resolve_backend(
            config.retention_backend,
            device=torch.device(torch.cuda.current_device()),
            dtype=config.params_dtype,
            key_dim=state,
            value_dim=self.head_dim,
        )
        self.recompute_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        convolved = width + 2 * groups * state
        self.linear_zxBC = input_projection(submodules.linear_zxBC, config, width + convolved, self.tp_group)
        self.linear_proj = output_projection(submodules.linear_proj, config, width, self.tp_group)
        self.linear_dt = HeadLogits(config, heads, self.tp_group)
        self.conv = ShortConvolution(config, convolved, self.tp_group, bias=True)
        self.norm = _NormWeight(config, width, self.tp_group)
        self.A_log, self.dt_bias, self.D = (self.parameter(heads) for _ in range(3))

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
        zxBC, _ = self.linear_zxBC(hidden_states)
        dt_logits = self.linear_dt(hidden_states)
        memory = attention_bias
        core = partial(self._core, shard, memory)
        if self.recompute_core and self.training and memory is None:
            y = tensor_parallel.checkpoint(lambda *x: core(*x)[0], False, zxBC, dt_logits)
            return self.linear_proj(y)
        y, recompute_into = core(zxBC, dt_logits)
        output, bias = self.linear_proj(y)
        if self.config.recompute_elementwise and self.training and torch.is_grad_enabled():
            recompute_in_backward(y, output, recompute_into)
        return output, bias

    def _core(
        self, shard: SequenceShard, memory: list[Tensor] | None, zxBC: Tensor, dt_logits: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], object]]:
        """Projections [s, b, G*(2*H/G*P + 2*N)] -> (gated, normalised y [s, b, H*P], a function that writes y)."""
        of_groups = zxBC.unflatten(-1, (-1, self.group_parts[0] + sum(self.group_parts)))
        z, xBC = of_groups.split((self.group_parts[0], sum(self.group_parts)), dim=-1)
        xBC = self.conv(xBC.flatten(2), shard).unflatten(-1, (-1, sum(self.group_parts)))
        x, B, C = xBC.split(self.group_parts, dim=-1)
        x = x.unflatten(-1, (-1, self.head_dim))  # with its groups, as heads of all groups would be a copy
        dt = F.softplus(widen(dt_logits) + widen(self.dt_bias))
        o = recurrence(
            lambda: C,
            B,
            recomputed(_times, x, dt),
            -widen(self.A_log).exp() * dt,
            shard,
            self.config,
            self.backend.name,
            scale=1.0,
        )
        inputs, eps = (o, x, z, self.D, self.norm.weight), self.config.layernorm_epsilon
        y = recomputed(_gated_norm, *inputs, eps=eps)
        if memory is not None:
            memory.append(recomputed(_with_skip, o, x, self.D))
        return y, lambda out: out.copy_(fused(_gated_norm, out.is_cuda)(*inputs, eps=eps))

    def backward_dw(self) -> None:
        """Compute the delayed weight gradients (called by Megatron's schedules)."""
        self.linear_proj.backward_dw()
        self.linear_zxBC.backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """FP8 with --recompute-modules layernorm: save the norm's input instead of its quantised output."""
        save_original_input(self.linear_zxBC)


class _NormWeight(CutByHead):
    """That of the gated norm [H*P], which is computed with the rest."""

    def __init__(self, config: YOCOConfig, width: int, tp_group: Any) -> None:
        super().__init__(config, tp_group)
        self.weight = self.parameter(width)


def _times(x: Tensor, dt: Tensor) -> Tensor:
    """x [s, b, G, H/G, P] times fp32 steps [s, b, H] -> [s, b, H, P], in x's dtype."""
    return (x.flatten(2, 3) * dt[..., None]).to(x.dtype)


def _gated_norm(o: Tensor, x: Tensor, z: Tensor, D: Tensor, weight: Tensor, eps: float) -> Tensor:
    """o [s, b, H, P], x [s, b, G, H/G, P], z [s, b, G, H/G*P], D [H], weight [H*P] -> RMS((o + D x) * silu(z)) weight,
    [s, b, H*P]."""
    y = _skip_added(o, x, D).view(z.shape) * F.silu(widen(z))
    return rms_norm(y, eps).flatten(2).to(x.dtype) * weight


def _skip_added(o: Tensor, x: Tensor, D: Tensor) -> Tensor:
    """o + D x, [s, b, H*P], at least in fp32."""
    return (widen(o) + widen(D)[:, None] * x.flatten(2, 3)).flatten(2)


def _with_skip(o: Tensor, x: Tensor, D: Tensor) -> Tensor:
    """o + D x, [s, b, H*P], in x's dtype."""
    return _skip_added(o, x, D).to(x.dtype)


def layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """Self-decoder layer with Mamba-2. Its norm is not fused: the steps need the normalised input too."""
    mixer = ModuleSpec(
        module=Mamba2,
        submodules=Mamba2Submodules(
            linear_zxBC=backend.column_parallel_linear(), linear_proj=backend.row_parallel_linear()
        ),
    )
    return pre_norm_layer(backend, mixer, backend.layer_norm(rms_norm=True), fused_into=None)


def init_law(name: str, shape: torch.Size) -> Law | None:
    """Those of the authors' code; of matrices that of every other one, which theirs have, too, but W_o."""
    if name.startswith("conv."):
        return uniform(WIDTH**-0.5)
    return {
        "A_log": log_of_uniform(*DECAYS),
        "dt_bias": softplus_is_log_uniform(*STEPS),
        "D": lambda w, _: w.fill_(1.0),
    }.get(name)
