"""Rotary position embedding with the paper's frequencies.

The authors' code spaces the exponents linearly from 0 to exactly 1: omega_j = theta^(-j / (R/2 - 1)), and rotates
interleaved pairs (2j, 2j+1). The usual RoPE is theta^(-2j/R). Self- and cross-decoder have their own tables, because
their head widths R may differ.
"""

import math

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from yoco_megatron.model.yoco_config import YOCOConfig


def inverse_frequencies(head_dim: int, base: float, variant: str, divisor: float | None = None) -> Tensor:
    """Angle per position of each pair, fp32 [head_dim / 2].

    Args:
        variant: --rope-variant (yoco or standard).
        divisor: of frequencies that turn less than once in 8,192 tokens, as in Llama 3.1; those that turn four times
            stay as they are, between them it passes linearly into 1. None: nowhere.
    """
    if variant == "yoco":
        exponents = torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)
    else:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = 1.0 / base**exponents
    if divisor is not None:
        turns = 8192 * frequencies / (2 * math.pi)
        unchanged = ((turns - 1) / 3).clamp(0, 1)
        frequencies *= unchanged + (1 - unchanged) / divisor
    return frequencies.float()


class YOCORotaryEmbedding(RotaryEmbedding):
    """Megatron's angle table, with YOCO's frequencies and any positions."""

    inv_freq: Tensor

    def __init__(self, config: YOCOConfig, head_dim: int, base: float) -> None:
        super().__init__(
            head_dim,
            rotary_percent=1.0,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=base,
            use_cpu_initialization=config.use_cpu_initialization,
        )
        divisor = config.rope_scaling_factor if config.use_rope_scaling else None
        self.inv_freq = inverse_frequencies(head_dim, base, config.rope_variant, divisor).to(self.inv_freq.device)

    def forward(self, positions: int | Tensor) -> Tensor:
        """Angles, fp32 [s, 1, 1, head_dim], or [s, b, 1, head_dim] where positions differ between samples.

        Args:
            positions: integers [s] or [s, b]; a number s means 0..s-1.
        """
        if isinstance(positions, int):
            positions = torch.arange(positions, device=torch.cuda.current_device())
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions.unsqueeze(-1) * self.inv_freq
        angles = angles.repeat_interleave(2, -1) if self.rotary_interleaved else torch.cat((angles, angles), -1)
        return (angles if angles.dim() == 3 else angles.unsqueeze(1)).unsqueeze(2)


def rotate(x_SBHD: Tensor, angles: Tensor, config: YOCOConfig) -> Tensor:
    """Rotate x [s, b, heads, head_dim] by angles [s, 1 or b, 1, head_dim]; fp32 arithmetic, x's dtype back."""
    power_of_two = x_SBHD.shape[-1].bit_count() == 1
    pairs_on_gpu = config.rotary_interleaved and x_SBHD.is_cuda and x_SBHD.dtype != torch.float64
    if config.apply_rope_fusion and pairs_on_gpu and power_of_two:
        from yoco_megatron.ops.fused.rotary import rotate as fused

        return fused(x_SBHD, angles)
    if angles.shape[1] > 1:  # the kernel takes one angle per row: turn samples into rows
        rows = rotate(x_SBHD.flatten(0, 1).unsqueeze(1), angles.flatten(0, 1).unsqueeze(1), config)
        return rows.view(x_SBHD.shape)
    if config.apply_rope_fusion:
        # Transformer Engine's kernel computes in fp32 and indexes with 32 bits: queries that are columns of a
        # projection of a million tokens are rotated in parts.
        most = (2**31 - 1) // max(1, x_SBHD.stride(0))
        if most < x_SBHD.shape[0]:
            parts = zip(x_SBHD.split(most), angles.split(most))
            return torch.cat([apply_rotary_pos_emb(x, part, config=config) for x, part in parts])
        return apply_rotary_pos_emb(x_SBHD, angles, config=config)
    wide = x_SBHD if x_SBHD.dtype == torch.float64 else x_SBHD.float()
    return apply_rotary_pos_emb(wide, angles, config=config).to(x_SBHD.dtype)
