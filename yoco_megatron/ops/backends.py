"""Implementations of an op, best first: which can run here, and why the others cannot."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    `why_not(device, dtype, key_dim, value_dim)` returns None if `run` handles such tensors, else the reason
    in words. `run` has the signature and the contract of the op's `torch.chunkwise`.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype, int, int], str | None]
    run: Callable[..., tuple[Tensor, Tensor]]


def explain(
    backends: Sequence[Backend], *, device: torch.device | str, dtype: torch.dtype, key_dim: int, value_dim: int
) -> dict[str, str | None]:
    """Every backend with the reason why it cannot run (None: it can)."""
    device = torch.device(device)
    return {backend.name: backend.why_not(device, dtype, key_dim, value_dim) for backend in backends}


def resolve(backends: Sequence[Backend], flag: str, requested: str, **where: Any) -> Backend:
    """The backend of that name, or for "auto" the first usable one; `where`: as for `explain`.

    Raises ValueError that names `flag` if the name is unknown or the backend cannot run such tensors: no silent
    fallback.
    """
    reasons = explain(backends, **where)
    by_name = {backend.name: backend for backend in backends}
    if requested == "auto":
        for name, reason in reasons.items():
            if reason is None:
                return by_name[name]
        listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"{flag} auto finds nothing that can run here ({listing})")
    if requested not in by_name:
        raise ValueError(f"{flag} {requested} is unknown; choose one of auto, {', '.join(by_name)}")
    if reasons[requested] is not None:
        raise ValueError(f"{flag} {requested} cannot run here: {reasons[requested]}; auto picks one that can")
    return by_name[requested]
