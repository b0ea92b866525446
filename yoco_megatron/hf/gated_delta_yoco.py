"""Gated DeltaNet (arXiv 2412.06464) as the mixer of a self-decoder layer: the layer of transformers' Qwen3-Next with as
many heads of keys as of values, its `in_proj_qkvz`, `in_proj_ba` and `conv1d` taken apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_yoco import YocoConfig
from .recurrence_yoco import YocoRMSNorm, from_cached_state, short_convolution, split_heads, widen

try:
    # The trainer's kernels, where it is installed; the torch code below computes the same.
    from yoco_megatron.ops.gated_delta import gated_delta
except ImportError:
    gated_delta = None  # type: ignore[assignment]

WIDTH = 4
"""Of the convolution's kernel."""
CHUNK = 64
LENGTH_EPS = 1e-6


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t, o_t = D^-1/2 q_t S_t, in chunks.

    q, k, v [b, H, s, D]; log_decay, beta [b, H, s] and state [b, H, D, D] in fp32 (fp64); documents [b, s] as in
    `retention`. Returns (o in q's dtype, state).
    """
    dtype, compute = q.dtype, state.dtype
    q, k, v = q.to(compute) * q.shape[-1] ** -0.5, k.to(compute), v.to(compute)
    if q.shape[2] == 1:
        state = log_decay[..., None].exp() * state
        state = state + k.transpose(-1, -2) @ (beta[..., None] * (v - k @ state))
        return (q @ state).to(dtype), state
    if documents is None:
        documents = torch.zeros(1, q.shape[2], dtype=torch.int32, device=q.device)
    outputs, before = [], documents[:, None, :1]
    chunks = zip(*(t.split(CHUNK, dim=2) for t in (q, k, v, log_decay, beta[..., None], documents[:, None])))
    for q_, k_, v_, g_, beta_, d_ in chunks:
        b = g_.cumsum(-1)
        # Masked before exp: above the diagonal the exponent is positive.
        causal = torch.ones(b.shape[-1], b.shape[-1], dtype=torch.bool, device=b.device).tril()
        visible = causal & (d_[..., :, None] == d_[..., None, :])
        decay = (b[..., :, None] - b[..., None, :]).masked_fill(~visible, -torch.inf).exp()
        from_start = b.masked_fill(d_ != before, -torch.inf).exp()[..., None]
        # (I + A) new = beta (v - exp(b) k S): what each token writes; the solver takes the diagonal for ones.
        A = (beta_ * k_ @ k_.transpose(-1, -2) * decay).tril(-1)
        new = beta_ * (v_ - (k_ * from_start) @ state)
        new = torch.linalg.solve_triangular(A, new, upper=False, unitriangular=True)
        outputs.append((q_ @ k_.transpose(-1, -2) * decay) @ new + (q_ * from_start) @ state)
        before = d_[..., -1:]
        to_end = (b[..., -1:] - b).masked_fill(d_ != before, -torch.inf).exp()[..., None]
        state = from_start[..., -1:, :] * state + (k_ * to_end).transpose(-1, -2) @ new
    return torch.cat(outputs, dim=2).to(dtype), state


def delta_rule_by_kernel(*inputs: Tensor, state: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by the trainer's kernels, whose layout is [b, s, H, D]."""
    inputs = tuple(t.transpose(1, 2) for t in inputs)
    o, state = gated_delta(*inputs, initial_state=state, document_ids=documents)
    return o.transpose(1, 2), state


def of_length_one(x: Tensor) -> Tensor:
    """x [..., D] divided by its length; fp32 arithmetic, x's dtype back."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + LENGTH_EPS)).to(x.dtype)


class YocoGatedDeltaNet(nn.Module):
    """out = (norm(o) * silu(x W_g)) W_o, with q, k and v behind a short convolution, q and k of length one; beta =
    sigmoid(x w_b), log decay g = -exp(A_log) softplus(x w_a + dt_bias)."""

    def __init__(self, config: YocoConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.self_decoder_head_dim
        heads, hidden = config.self_decoder_heads, config.hidden_size
        width = heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (nn.Linear(hidden, width, bias=False) for _ in range(4))
        self.b_proj, self.a_proj = (nn.Linear(hidden, heads, bias=False) for _ in range(2))
        self.q_conv, self.k_conv, self.v_conv = (
            nn.Conv1d(width, width, WIDTH, groups=width, bias=False) for _ in range(3)
        )
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.norm = YocoRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def reset(self) -> None:
        """A new model's weights that are of no layer of torch's; the trainer draws them at random."""
        init.constant_(self.A_log, 1.0)
        init.constant_(self.dt_bias, -4.6)  # a step of 0.01

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
        projected = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1)
        convolved = short_convolution(projected, [self.q_conv, self.k_conv, self.v_conv], mask, layer, documents)
        q, k, v = (split_heads(t, self.head_dim) for t in convolved.chunk(3, -1))
        q, k = of_length_one(q), of_length_one(k)
        # The state, beta and decays never see 16 bits.
        beta = widen(self.b_proj(x)).sigmoid().transpose(1, 2)
        steps = F.softplus(widen(self.a_proj(x)) + widen(self.dt_bias))
        log_decay = (-widen(self.A_log).exp() * steps).transpose(1, 2)
        if mask is not None:  # a padding token writes nothing and lets nothing decay
            log_decay, beta = log_decay * mask[:, None], beta * mask[:, None]
        long = q.is_cuda and q.shape[2] > 1 and not torch.compiler.is_compiling()
        run = delta_rule_by_kernel if long and gated_delta is not None else delta_rule
        o = from_cached_state(run, layer, q, k, v, log_decay, beta, documents=documents)
        memory = self.norm(o.transpose(1, 2)).flatten(2)
        y = widen(memory) * F.silu(widen(self.g_proj(x)))
        return self.o_proj(y.to(x.dtype)), memory
