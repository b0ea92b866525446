"""Dispatch of gated retention: pick the fastest backend that can run here, and say why the others cannot.

A backend is one entry of `BACKENDS`, best first. A new kernel needs its entry here and nothing else.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_megatron.ops import backends
from yoco_megatron.ops.backends import Backend
from yoco_megatron.ops.gated_retention.reference import check_layout
from yoco_megatron.ops.gated_retention.torch import chunkwise
from yoco_megatron.ops.gated_retention.torch import step as torch_step


def _torch_why_not(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    if not dtype.is_floating_point:
        return f"needs floating point tensors, not {dtype}"
    return None


def _triton_why_not(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> str | None:
    # Triton is imported only where it can be used: a CPU-only torch comes without it.
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return "needs a CUDA GPU"
    try:
        from yoco_megatron.ops.gated_retention import triton
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return triton.why_not(device, dtype, key_dim, value_dim)


def _triton_run(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    from yoco_megatron.ops.gated_retention import triton

    return triton.gated_retention(*args, **options)


# Best first: "auto" takes the first that can run.
BACKENDS: list[Backend] = [
    Backend("triton", _triton_why_not, _triton_run),
    Backend("torch", _torch_why_not, chunkwise),
]


def explain(**where: Any) -> dict[str, str | None]:
    """See `backends.explain`."""
    return backends.explain(BACKENDS, **where)


def resolve_backend(requested: str, **where: Any) -> Backend:
    """The backend named by `--retention-backend`; see `backends.resolve`."""
    return backends.resolve(BACKENDS, "--retention-backend", requested, **where)


def gated_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    chunk_size: int = 128,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Gated retention (paper 2405.05254, Eq. 5 and following) over [B, T, H, K] tensors, by the best backend.

    Shapes: q, k [B, T, H, K], or of fewer heads, each for as many neighbouring ones of v; v [B, T, H, V];
    log_decay [B, T, H], natural logarithm, finite and <= 0; initial_state [B, H, K, V] or None; document_ids integers
    [B, T], equal within a document and non-decreasing along T, or None for one document: no state crosses a document
    boundary, the initial state continues the first token's document, the final state is that of the last token's.
    `scale` multiplies k, default K ** -0.5. Strided views are accepted.
    Returns o [B, T, H, V] in q.dtype and the final state [B, H, K, V], float32 (float64 for float64 inputs).
    Raises ValueError for another layout, or naming `--retention-backend` if that backend cannot run.
    """
    check_layout(q, k, v, log_decay, initial_state, document_ids)
    chosen = resolve_backend(backend, device=q.device, dtype=q.dtype, key_dim=q.shape[-1], value_dim=v.shape[-1])
    return chosen.run(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        document_ids=document_ids,
        chunk_size=chunk_size,
    )


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    *,
    scale: float | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for decoding, by the best backend; arguments and results are `torch.step`'s.

    With `in_place` a kernel may overwrite the state, and return it. Only the torch backend has gradients; it runs
    whenever one is required.
    """
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, state))
    best = resolve_backend("auto", device=q.device, dtype=q.dtype, key_dim=q.shape[-1], value_dim=v.shape[-1])
    if wants_gradient or best.name == "torch":
        return torch_step(q, k, v, log_decay, state, scale=scale)
    from yoco_megatron.ops.gated_retention import triton

    return triton.step(q, k, v, log_decay, state, scale=scale, in_place=in_place)


def log_decay_from_logits(logits: Tensor, temperature: float = 16.0) -> Tensor:
    """g = logsigmoid(logits) / temperature: the natural logarithm of the decay (paper Eq. 5).

    The paper leaves the temperature unnamed; 16 is the authors' code. Any shape and floating dtype; the
    result is float32 (float64 for float64), because in bfloat16 the decay of slow heads would round to 1.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.logsigmoid(wide) / temperature
