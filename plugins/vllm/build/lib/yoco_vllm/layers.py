"""Layers of a YOCO in vLLM: window attention, the shared K,V, and cross attention that only reads them.

Shapes: t tokens of all sequences of a step, h hidden; heads are this tensor-parallel rank's.
"""

import math

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)


def share(heads: int, what: str) -> int:
    """This rank's heads. Raises ValueError where they do not divide."""
    ranks = get_tensor_model_parallel_world_size()
    if heads % ranks:
        raise ValueError(f"--tensor-parallel-size {ranks} does not divide the model's {heads} {what}")
    return heads // ranks


def self_decoder_width(config) -> int:
    """Of one of its heads. Folders of older versions do not say it."""
    return getattr(config, "self_decoder_head_dim", None) or config.hidden_size // config.self_decoder_heads


def state_shape(config, ranks: int) -> tuple[int, int, int]:
    """One layer's state [H, D, D] of a sequence on each of so many tensor-parallel ranks."""
    width = self_decoder_width(config)
    return config.self_decoder_heads // ranks, width, width


class Rotary(nn.Module):
    """YOCO's rotary embedding of heads of one width: its own frequencies, pairs (2j, 2j + 1)."""

    def __init__(self, config, head_dim: int) -> None:
        super().__init__()
        self.head_dim, self.interleaved = head_dim, config.rope_interleaved
        if config.rope_variant == "yoco":
            exponents = torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)
        else:
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        frequencies = 1.0 / config.rope_theta**exponents
        if getattr(config, "use_rope_scaling", False):
            turns = 8192 * frequencies / (2 * math.pi)
            unchanged = ((turns - 1) / 3).clamp(0, 1)
            frequencies *= unchanged + (1 - unchanged) / config.rope_scaling_factor
        self.register_buffer("inv_freq", frequencies.float(), persistent=False)

    def forward(self, positions: Tensor, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """positions [t], x [t, heads * head_dim] -> x, its heads normalised by `norm`, and rotated, in its dtype."""
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, self.head_dim)).contiguous()).flatten(-2)
        angles = positions[:, None, None].float() * self.inv_freq.float()
        cos, sin = angles.cos(), angles.sin()
        wide = x.float().unflatten(-1, (-1, self.head_dim))
        if self.interleaved:
            a, b = wide[..., 0::2], wide[..., 1::2]
            y = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        else:
            a, b = wide.chunk(2, dim=-1)
            y = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return y.flatten(-2).to(x.dtype)


def head_norm(config, head_dim: int) -> nn.Module | None:
    """The norm of queries or keys, over the width of a head, if the model has it."""
    return RMSNorm(head_dim, eps=config.rms_norm_eps) if getattr(config, "qk_norm", False) else None


def has_qkv_bias(config) -> bool:
    """Whether the projections to queries, keys and values have biases."""
    return getattr(config, "qkv_bias", False)


class KVWriter(Attention):
    """A global K,V cache: an attention layer whose cache is written and that is never called."""

    def write(self, k: Tensor, v: Tensor) -> None:
        """k, v [t, heads, width] into the pages of this step's tokens."""
        if self.attn_backend.forward_includes_kv_cache_update:
            raise ValueError(
                f"attention backend {self.attn_backend.get_name()} writes its cache inside attention; choose FLASH_ATTN"
            )
        k, v = k.contiguous(), v.contiguous()
        if self.use_direct_call:
            unified_kv_cache_update(k, v, self.layer_name)
        else:
            from vllm.model_executor.layers.attention.attention import _encode_layer_name

            torch.ops.vllm.unified_kv_cache_update(k, v, _encode_layer_name(self.layer_name))


class SlidingAttention(nn.Module):
    """Self-decoder mixer."""

    def __init__(self, config, vllm: VllmConfig, prefix: str) -> None:
        super().__init__()
        heads, groups = config.self_decoder_heads, config.self_decoder_key_value_heads
        width = self_decoder_width(config)
        self.rotary = Rotary(config, width)
        own_heads, own_groups = share(heads, "self-decoder heads"), share(groups, "self-decoder K,V heads")
        self.sizes = [own_heads * width, own_groups * width, own_groups * width]
        h, common, bias = config.hidden_size, {"quant_config": vllm.quant_config}, has_qkv_bias(config)
        self.qkv_proj = QKVParallelLinear(h, width, heads, groups, bias=bias, prefix=f"{prefix}.qkv_proj", **common)
        self.o_proj = RowParallelLinear(heads * width, h, bias=False, prefix=f"{prefix}.o_proj", **common)
        self.q_norm, self.k_norm = head_norm(config, width), head_norm(config, width)
        self.attn = Attention(
            own_heads,
            width,
            width**-0.5,
            num_kv_heads=own_groups,
            cache_config=vllm.cache_config,
            quant_config=vllm.quant_config,
            per_layer_sliding_window=config.sliding_window,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)[0].split(self.sizes, dim=-1)
        q, k = self.rotary(positions, q, self.q_norm), self.rotary(positions, k, self.k_norm)
        return self.o_proj(self.attn(q, k, v))[0]


class CrossAttention(nn.Module):
    """Cross-decoder mixer: queries over the pages that `KVWriter` of layer `target` fills."""

    def __init__(self, config, vllm: VllmConfig, prefix: str, target: str) -> None:
        super().__init__()
        heads, width = config.num_attention_heads, config.head_dim
        self.rotary = Rotary(config, width)
        h, common, bias = config.hidden_size, {"quant_config": vllm.quant_config}, has_qkv_bias(config)
        self.q_proj = ColumnParallelLinear(h, heads * width, bias=bias, prefix=f"{prefix}.q_proj", **common)
        self.o_proj = RowParallelLinear(heads * width, h, bias=False, prefix=f"{prefix}.o_proj", **common)
        self.q_norm = head_norm(config, width)
        self.attn = Attention(
            share(heads, "attention heads"),
            width,
            width**-0.5,
            num_kv_heads=share(config.num_key_value_heads, "K,V heads"),
            cache_config=vllm.cache_config,
            quant_config=vllm.quant_config,
            kv_sharing_target_layer_name=target,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        q = self.rotary(positions, self.q_proj(x)[0], self.q_norm)
        return self.o_proj(self.attn(q, None, None))[0]


class SharedKV(nn.Module):
    """Projects the self-decoder's output to the sets of K,V, and writes each to its cache, of the name in `writers`.

    Rows of the projections are ordered by head, and for one head by set.
    """

    def __init__(self, config, vllm: VllmConfig, prefix: str, writers: list[str]) -> None:
        super().__init__()
        width, groups, sets = config.head_dim, config.num_key_value_heads, len(writers)
        self.shape = (-1, sets, width)
        self.rotary = Rotary(config, width)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        common = {"bias": has_qkv_bias(config), "quant_config": vllm.quant_config}
        rows = groups * sets * width
        self.k_proj = ColumnParallelLinear(config.hidden_size, rows, prefix=f"{prefix}.k_proj", **common)
        self.v_proj = ColumnParallelLinear(config.hidden_size, rows, prefix=f"{prefix}.v_proj", **common)
        self.k_norm = nn.ModuleList(head_norm(config, width) for _ in writers)  # None where the model has none
        self.writers = nn.ModuleList(
            KVWriter(
                share(config.num_attention_heads, "attention heads"),
                width,
                width**-0.5,
                num_kv_heads=share(groups, "K,V heads"),
                cache_config=vllm.cache_config,
                quant_config=vllm.quant_config,
                prefix=name,
            )
            for name in writers
        )

    def forward(self, positions: Tensor, x: Tensor) -> None:
        x = self.norm(x)
        of_sets = (projection(x)[0].unflatten(-1, self.shape).unbind(2) for projection in (self.k_proj, self.v_proj))
        for writer, norm, k, v in zip(self.writers, self.k_norm, *of_sets):
            writer.write(self.rotary(positions, k.flatten(1), norm).view_as(v), v)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config, vllm: VllmConfig, prefix: str) -> None:
        super().__init__()
        h, ffn = config.hidden_size, config.intermediate_size
        common = {"bias": False, "quant_config": vllm.quant_config}
        self.gate_up_proj = MergedColumnParallelLinear(h, [ffn, ffn], prefix=f"{prefix}.gate_up_proj", **common)
        self.down_proj = RowParallelLinear(ffn, h, prefix=f"{prefix}.down_proj", **common)
        self.act = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x)[0]))[0]


class Layer(nn.Module):
    """Pre-norm layer: mixer, SwiGLU, a residual around each."""

    def __init__(self, config, vllm: VllmConfig, prefix: str, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config, vllm, f"{prefix}.mlp")

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        x = x + self.mixer(positions, self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))
