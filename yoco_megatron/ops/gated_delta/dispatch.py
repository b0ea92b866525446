"""Dispatch of the gated delta rule: the fastest backend that can run here, and why the others cannot."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from yoco_megatron.ops.gated_delta import fla
from yoco_megatron.ops.gated_delta.torch import chunkwise


@dataclass(frozen=True)
class Backend:
    """One implementation. `why_not(device, dtype, key_dim, value_dim)` is None if `run`, which has the signature of
    `torch.chunkwise`, handles such tensors, else the reason in words."""

    name: str
    why_not: Callable[[torch.device, torch.dtype, int, int], str | None]
    run: Callable[..., tuple[Tensor, Tensor]]


# Best first: "auto" takes the first that can run.
BACKENDS = [Backend("fla", fla.why_not, fla.run), Backend("torch", lambda *_: None, chunkwise)]


def explain(*, device: torch.device | str, dtype: torch.dtype, key_dim: int, value_dim: int) -> dict[str, str | None]:
    """Every backend, best first, with the reason why it cannot run (None: it can)."""
    device = torch.device(device)
    return {backend.name: backend.why_not(device, dtype, key_dim, value_dim) for backend in BACKENDS}


def resolve_backend(
    requested: str, *, device: torch.device | str, dtype: torch.dtype, key_dim: int, value_dim: int
) -> Backend:
    """The backend named by `--gated-delta-backend`, or for "auto" the first usable one.

    `dtype` is that of q, k and v; `key_dim` and `value_dim` are widths of one head.
    Raises ValueError if the name is unknown or the backend cannot run such tensors: no silent fallback.
    """
    reasons = explain(device=device, dtype=dtype, key_dim=key_dim, value_dim=value_dim)
    by_name = {backend.name: backend for backend in BACKENDS}
    if requested == "auto":
        return next(by_name[name] for name, reason in reasons.items() if reason is None)
    if requested not in by_name:
        raise ValueError(f"--gated-delta-backend {requested} is unknown; choose one of auto, {', '.join(by_name)}")
    if reasons[requested] is not None:
        raise ValueError(
            f"--gated-delta-backend {requested} cannot run here: {reasons[requested]}; auto picks one that can"
        )
    return by_name[requested]


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    document_ids: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The rule over [B, T, H, K] tensors by the best backend; arguments and results are those of `torch.chunkwise`.

    Raises ValueError for another layout, or naming `--gated-delta-backend` if that backend cannot run.
    """
    chosen = resolve_backend(backend, device=q.device, dtype=q.dtype, key_dim=q.shape[-1], value_dim=v.shape[-1])
    return chosen.run(q, k, v, log_decay, beta, scale=scale, initial_state=initial_state, document_ids=document_ids)
