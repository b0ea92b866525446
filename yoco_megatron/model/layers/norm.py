"""RMSNorm in plain torch, for layers without Transformer Engine (paper section 2; yoco.md's norm table).

y = x / sqrt(mean(x^2) + eps) in fp32, cast to the input's dtype, then times the weight.
"""

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """RMSNorm with weight [hidden_size]; Megatron's own `WrappedTorchNorm` does not allow sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # With sequence parallelism every rank has other tokens, so the gradient is summed over ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden_size], any float dtype; the weight's dtype back (--fp32-residual-connection norms fp32)."""
        return (rms_norm(x, self.eps) * self.weight).to(self.weight.dtype)


class StandaloneRMSNorm(RMSNorm):
    """RMSNorm in the place of Transformer Engine's standalone norm (others are fused into a linear layer).

    That norm saves an (empty) extra state. This one has it, too, so that checkpoints fit both, like Megatron's own
    linear layers.
    """

    def get_extra_state(self) -> None:
        """Nothing to save."""

    def set_extra_state(self, state: object) -> None:
        """Nothing to load."""


def head_norm(norm: type, config: TransformerConfig) -> torch.nn.Module:
    """--qk-layernorm: RMSNorm over the width of each head, before RoPE, with one weight for all heads; or the identity.

    Tensor-parallel ranks have the same weight and other heads. Megatron sums its gradient over them by the name of the
    module, which must be q_layernorm or k_layernorm.
    """
    if not config.qk_layernorm:
        return IdentityOp()
    return norm(config=config, hidden_size=config.kv_channels, eps=config.layernorm_epsilon)


def widen(x: torch.Tensor) -> torch.Tensor:
    """16-bit tensors as fp32, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / RMS(x) over the last dimension, without a weight; arithmetic in fp32 or wider, result in x's dtype."""
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
