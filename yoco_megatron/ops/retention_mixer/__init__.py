"""Everything of a retention layer between its two projections: rotation, decay, retention, norm and gate.

out = silu(g) * RMS(retention(R q, R k, v, logsigmoid(logits) / tau))      (paper section 3, equations 5-8)
"""

from yoco_megatron.ops.retention_mixer.torch import mix

__all__ = ["mix"]
