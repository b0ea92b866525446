"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464): a state that replaces what a key held, and decays.

S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t ,     o_t = q_t S_t
"""

from yoco_megatron.ops.gated_delta.dispatch import Backend, explain, gated_delta, resolve_backend
from yoco_megatron.ops.gated_delta.torch import step

__all__ = ["Backend", "explain", "gated_delta", "resolve_backend", "step"]
