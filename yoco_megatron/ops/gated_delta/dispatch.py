"""Dispatch of the gated delta rule: the fastest backend that can run here."""

from typing import Any

from torch import Tensor

from yoco_megatron.ops import backends
from yoco_megatron.ops.backends import Backend
from yoco_megatron.ops.gated_delta import fla
from yoco_megatron.ops.gated_delta.torch import chunkwise

# Best first: "auto" takes the first that can run.
BACKENDS = [Backend("fla", fla.why_not, fla.run), Backend("torch", lambda *_: None, chunkwise)]


def explain(**where: Any) -> dict[str, str | None]:
    """See `backends.explain`."""
    return backends.explain(BACKENDS, **where)


def resolve_backend(requested: str, **where: Any) -> Backend:
    """The backend named by `--gated-delta-backend`; see `backends.resolve`."""
    return backends.resolve(BACKENDS, "--gated-delta-backend", requested, **where)


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
