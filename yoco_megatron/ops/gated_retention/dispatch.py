"""Dispatch of gated retention: pick the fastest backend that can run here, and say why the others cannot.

A backend is one entry of `BACKENDS`, best first. A new kernel needs its entry here and nothing else.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yoco_megatron.ops.gated_retention.reference import check_layout
from yoco_megatron.ops.gated_retention.torch import chunkwise
from yoco_megatron.ops.gated_retention.torch import step as torch_step


@dataclass(frozen=True)
class Backend:
    """One implementation of gated retention.

    `why_not(device, dtype, key_dim, value_dim)` returns None if `run` handles such tensors, else the reason
    in words. `run` has the signature and the contract of `torch.chunkwise`.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype, int, int], str | None]
    run: Callable[..., tuple[Tensor, Tensor]]


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


def explain(*, device: torch.device | str, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, str | None]:
    """Every backend, best first, with the reason why it cannot run (None: it can). For the doctor tool."""
    device = torch.device(device)
    return {backend.name: backend.why_not(device, dtype, key_dim, value_dim) for backend in BACKENDS}


def resolve_backend(
    requested: str, *, device: torch.device | str, dtype: torch.dtype, key_dim: int, value_dim: int
) -> Backend:
    """The backend named by `--retention-backend`, or for "auto" the first usable one.

    `dtype` is that of q, k and v; `key_dim` and `value_dim` are widths of one head.
    Raises ValueError if the name is unknown or the backend cannot run such tensors: no silent fallback.
    """
    reasons = explain(device=device, dtype=dtype, key_dim=key_dim, value_dim=value_dim)
    by_name = {backend.name: backend for backend in BACKENDS}
    if requested == "auto":
        for name, reason in reasons.items():
            if reason is None:
                return by_name[name]
        listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"--retention-backend auto finds nothing that can run here ({listing})")
    if requested not in by_name:
        raise ValueError(f"--retention-backend {requested} is unknown; choose one of auto, {', '.join(by_name)}")
    if reasons[requested] is not None:
        raise ValueError(
            f"--retention-backend {requested} cannot run here: {reasons[requested]}; auto picks one that can"
        )
    return by_name[requested]


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
