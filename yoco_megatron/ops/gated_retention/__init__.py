"""Gated retention (paper 2405.05254): the self-decoder's linear recurrence with a data-dependent decay.

S_t = exp(g_t) S_{t-1} + k_t^T v_t ,     o_t = q_t S_t
"""

from yoco_megatron.ops.gated_retention.dispatch import (
    Backend,
    explain,
    gated_retention,
    log_decay_from_logits,
    resolve_backend,
    step,
)

__all__ = ["Backend", "explain", "gated_retention", "log_decay_from_logits", "resolve_backend", "step"]
