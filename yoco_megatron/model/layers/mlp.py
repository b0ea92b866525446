"""SwiGLU MLP with optional activation recompute.

The widest activations of a layer are here: 2 x ffn-hidden-size values per token before SwiGLU, half as many after, and
as many again for their gradients. `--recompute-elementwise` recomputes the half after SwiGLU in backward.
`--mlp-chunks-for-training N` is for sequences so long that even one layer's activations are too large. Megatron's
TransformerLayer then calls the MLP for one part of the sequence after the other, which alone saves nothing, because
backward needs all parts. Here each part is recomputed in backward, so that only one is in memory at a time: 1M tokens
on two GPUs need that.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from yoco_megatron.model.layers.recompute import recompute_in_backward
from yoco_megatron.ops.fused.swiglu import fused_swiglu, fused_swiglu_into


class RecomputeMLP(MLP):
    """Megatron's SwiGLU MLP, parts of it recomputed in backward as the flags say."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> ([s, b, h], no bias)."""
        if self.training and self.config.mlp_chunks_for_training > 1:
            return tensor_parallel.checkpoint(partial(self._run, recompute=False, **kwargs), False, hidden_states)
        recompute = self.training and self.config.recompute_elementwise and torch.is_grad_enabled()
        return self._run(hidden_states, recompute, **kwargs)

    def _run(self, hidden_states: Tensor, recompute: bool, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        fused = self.config.bias_activation_fusion
        if not recompute and (not fused or self.config.activation_func_fp8_input_store or self.config.cpu_offloading):
            return super().forward(hidden_states, **kwargs)
        wide, _ = self.linear_fc1(hidden_states)
        y = fused_swiglu(wide) if fused else swiglu(wide)
        output, bias = self.linear_fc2(y)
        if recompute:
            recompute_in_backward(y, output, partial(fused_swiglu_into if fused else swiglu_into, wide))
        return output, bias


def swiglu(wide: Tensor) -> Tensor:
    """silu(a) b of wide [..., 2 F], a and b side by side -> [..., F], rounded after each of the two operations."""
    a, b = wide.chunk(2, dim=-1)
    return F.silu(a) * b


def swiglu_into(wide: Tensor, out: Tensor) -> None:
    """Write swiglu(wide) into `out` [..., F], bit for bit."""
    out.copy_(swiglu(wide))
