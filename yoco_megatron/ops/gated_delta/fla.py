"""The gated delta rule by flash-linear-attention's Triton kernels."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_megatron.ops.gated_delta.reference import check_layout

WIPES = -100.0
"""A log decay after which nothing is left in fp32. Small, because the kernels add up those of 64 tokens: with one start
of a document among them a sum is off by 4e-6, with sixty by 2e-4, where 16-bit values are off by 2e-3."""


def why_not(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    """The reason in words why such tensors cannot go through the kernels; None if they can."""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if find_spec("fla") is None:
        return "needs the package flash-linear-attention"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    return "needs keys of width 256 at most" if key_dim > 256 else None


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments, results and errors of `torch.chunkwise`. Documents are kept apart by a decay: for their lengths, which
    the kernels could take, the host would have to wait."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    check_layout(q, k, v, log_decay, beta, initial_state, document_ids)
    if document_ids is not None:
        starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
        log_decay = log_decay.masked_fill(starts[..., None], WIPES)
    return chunk_gated_delta_rule(
        q, k, v, log_decay, beta, scale=scale, initial_state=initial_state, output_final_state=True
    )
