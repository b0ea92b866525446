"""Mamba-2 (arXiv 2405.21060) as the mixer of a self-decoder layer, with the weights of transformers' Mamba2Mixer taken
apart: `in_proj` is z_proj, x_proj, B_proj, C_proj and dt_proj, `conv1d` is x_conv, B_conv and C_conv."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_yoco import YocoConfig
from .recurrence_yoco import cached_retention, short_convolution, split_heads, widen

WIDTH = 4
"""Of the convolution's kernel."""


class YocoGatedNorm(nn.Module):
    """RMS(y * silu(z)) over each of several groups, times the weight; fp32, back to z's dtype before the weight."""

    def __init__(self, width: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y = (y * F.silu(widen(z))).unflatten(-1, (self.groups, -1))
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).flatten(2)
        return y.to(z.dtype) * self.weight


class YocoMamba2(nn.Module):
    """dt = softplus(x w + dt_bias), g = -exp(A_log) dt, S_t = exp(g_t) S_{t-1} + B_t^T (dt x_t), y = C_t S_t + D x_t,
    out = (RMS(y * silu(z)) norm) W_o, with x, B and C behind a short convolution."""

    def __init__(self, config: YocoConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, groups = config.mamba_num_heads, config.mamba_num_groups
        width, keys, hidden = heads * config.mamba_head_dim, groups * config.mamba_state_dim, config.hidden_size
        self.z_proj = nn.Linear(hidden, width, bias=False)
        self.x_proj = nn.Linear(hidden, width, bias=False)
        self.B_proj = nn.Linear(hidden, keys, bias=False)
        self.C_proj = nn.Linear(hidden, keys, bias=False)
        self.dt_proj = nn.Linear(hidden, heads, bias=False)
        self.x_conv, self.B_conv, self.C_conv = (
            nn.Conv1d(channels, channels, WIDTH, groups=channels) for channels in (width, keys, keys)
        )
        self.A_log, self.dt_bias, self.D = (nn.Parameter(torch.empty(heads)) for _ in range(3))
        self.norm = YocoGatedNorm(width, groups, config.rms_norm_eps)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def reset(self) -> None:
        """A new model's weights that are of no layer of torch's; the trainer draws them at random."""
        init.constant_(self.A_log, 1.0)
        init.constant_(self.dt_bias, -4.6)  # a step of 0.01
        init.ones_(self.D)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None = None,
        documents: Tensor | None = None,
        **kwargs,
    ):
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        z, dt = self.z_proj(x), self.dt_proj(x)
        projected = [projection(x) for projection in (self.x_proj, self.B_proj, self.C_proj)]
        widths = [values.shape[-1] for values in projected]
        convolutions = [self.x_conv, self.B_conv, self.C_conv]
        convolved = short_convolution(torch.cat(projected, -1), convolutions, mask, layer, documents)
        x, B, C = convolved.split(widths, -1)
        x = split_heads(x, self.config.mamba_head_dim)
        B, C = (split_heads(t, self.config.mamba_state_dim) for t in (B, C))  # each for the heads of a group
        # The state, steps and decays never see 16 bits.
        dt = F.softplus(widen(dt) + widen(self.dt_bias)).transpose(1, 2)
        log_decay = -widen(self.A_log).exp()[:, None] * dt
        v = (x * dt[..., None]).to(x.dtype)
        y = cached_retention(C, B, v, log_decay, mask=mask, layer=layer, documents=documents, scale=1.0)
        y = (widen(y) + widen(self.D)[:, None, None] * x).transpose(1, 2).flatten(2)
        return self.o_proj(self.norm(y, z)), y
