"""Gated retention of a self-decoder layer in vLLM: out = (silu(x W_g) * RMS(o)) W_o, its state a linear-attention one.

The state and the decay are fp32 whatever the model's dtype is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from yoco_megatron.ops.gated_retention import log_decay_from_logits
from yoco_vllm.layers import Rotary, self_decoder_width, share, state_shape
from yoco_vllm.states import retain


class GatedRetention(nn.Module, MambaBase):
    """Self-decoder mixer."""

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, config, vllm: VllmConfig, prefix: str) -> None:
        super().__init__()
        if vllm.speculative_config is not None:
            raise ValueError(
                "--speculative-config: a retention state cannot forget the tokens that are rejected; remove it"
            )
        h, heads = config.hidden_size, config.self_decoder_heads
        width = self_decoder_width(config)
        self.prefix, self.config, self.own_heads = prefix, config, share(heads, "self-decoder heads")
        self.rotary = Rotary(config, width)
        common = {"bias": False, "quant_config": vllm.quant_config}
        self.qkv_proj = QKVParallelLinear(h, width, heads, heads, prefix=f"{prefix}.qkv_proj", **common)
        self.g_proj = ColumnParallelLinear(h, heads * width, prefix=f"{prefix}.g_proj", **common)
        # Of one column a head: too narrow for kernels of quantized weights.
        self.decay_proj = ColumnParallelLinear(h, heads, bias=False, prefix=f"{prefix}.decay_proj")
        self.o_proj = RowParallelLinear(heads * width, h, prefix=f"{prefix}.o_proj", **common)
        # Where vLLM looks for layers that have a cache.
        vllm.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, int, int]]:
        return (state_shape(self.config, get_tensor_model_parallel_world_size()),)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        return (torch.float32,)

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        """x [t, h] -> [t, h]."""
        q, k, v = self.qkv_proj(x)[0].chunk(3, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.own_heads, -1)) for t in (self.rotary(positions, q), self.rotary(positions, k), v)
        )
        log_decay = log_decay_from_logits(self.decay_proj(x)[0], self.config.decay_temperature)
        batches = get_forward_context().attn_metadata
        # Without one vLLM measures memory, and no sequence has a state.
        o = v if batches is None else retain(q, k, v, log_decay, self.kv_cache[0], batches[self.prefix])
        wide = o.float()
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)).to(x.dtype)
        return self.o_proj(F.silu(self.g_proj(x)[0]) * y.flatten(-2))[0]
