"""The FFN of a layer of YOCO: SwiGLU, or a mixture of such experts, of which each token goes through a few.

A token's experts depend on that token alone. Shapes: T tokens, h hidden, E experts, k of them for each token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.utils.import_utils import is_tracing

from .configuration_yoco import YocoConfig


class YocoMLP(nn.Module):
    """SwiGLU of `width` inner values."""

    def __init__(self, config: YocoConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [..., h]; `scale` [..., 1] is for the inner values."""
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(inner if scale is None else (inner * scale).to(inner.dtype))


class YocoRouter(nn.Module):
    """Which experts a token goes through, and how much each counts: as Megatron computes it, in fp32 after the product.

    `e_score_correction_bias` takes part in the choice alone. No gradient reaches it.
    """

    def __init__(self, config: YocoConfig):
        super().__init__()
        self.config = config
        count = config.num_experts or 0
        self.weight = nn.Parameter(torch.empty(count, config.hidden_size))
        if config.use_expert_bias:
            bias = torch.zeros(count, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def reset(self) -> None:
        init.normal_(self.weight, std=self.config.initializer_range)
        if self.config.use_expert_bias:
            init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, h]; returns (weights in the dtype of the product, numbers of the experts), both [T, k]."""
        config, k = self.config, self.config.num_experts_per_tok
        dtype = {"fp32": torch.float32, "fp64": torch.float64, None: x.dtype}[config.router_dtype]
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
            if config.scoring_func == "softmax" and not config.router_pre_softmax:
                chosen = self._choose(logits)
                weights = logits.gather(-1, chosen).softmax(-1, dtype=torch.float32)
            elif config.scoring_func == "softmax":
                scores = logits.softmax(-1, dtype=torch.float32)
                chosen = self._choose(scores)
                weights = scores.gather(-1, chosen)
            else:
                scores = logits.float()
                scores = scores.sigmoid() if config.scoring_func == "sigmoid" else F.softplus(scores).sqrt()
                chosen = self._choose(scores + self.e_score_correction_bias if config.use_expert_bias else scores)
                weights = scores.gather(-1, chosen)
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if k > 1 else weights
            return (weights * (config.routed_scaling_factor or 1.0)).to(dtype), chosen

    def _choose(self, scores: Tensor) -> Tensor:
        """The k experts [T, k] of the highest scores [T, E]; with groups, of those of the best groups."""
        config, k = self.config, self.config.num_experts_per_tok
        if config.topk_group:
            groups = scores.unflatten(-1, (config.n_group, -1))
            best = groups.topk(k // config.topk_group, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            scores = groups.masked_fill(out[..., None], -torch.inf).flatten(-2)
        return scores.topk(k, dim=-1).indices


class YocoExperts(nn.Module):
    """A mixture of experts, and an expert for all tokens beside it, if the model has one (with or without a gate)."""

    def __init__(self, config: YocoConfig):
        super().__init__()
        width, count = config.moe_intermediate_size, config.num_experts or 0
        self.gate = YocoRouter(config)
        self.experts = nn.ModuleList(YocoMLP(config, width) for _ in range(count))
        shared = config.shared_expert_intermediate_size
        self.shared_expert = YocoMLP(config, shared) if shared else None
        gated = shared and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        y = self._routed(tokens, *self.gate(tokens)).view_as(x)
        if self.shared_expert is None:
            return y
        shared = self.shared_expert(x)
        return y + (shared if self.shared_expert_gate is None else shared * self.shared_expert_gate(x).sigmoid())

    def _routed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [T, h]; weights and chosen [T, k]."""
        y = torch.zeros_like(x)
        if is_tracing(x):  # the shapes of a graph know no data: each expert for all tokens, most with weight 0
            for number, expert in enumerate(self.experts):
                y = y + expert(x, (weights * (chosen == number)).sum(-1, keepdim=True))
            return y
        # In training also those without a token: a data-parallel wrapper waits for the gradients of all.
        for number in range(len(self.experts)) if self.training else chosen.unique().tolist():
            token, place = (chosen == number).nonzero(as_tuple=True)
            part = self.experts[number](x[token], weights[token, place, None])
            y = y.index_add(0, token, part.to(y.dtype))
        return y
