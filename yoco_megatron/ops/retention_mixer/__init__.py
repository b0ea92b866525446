"""Everything of a retention layer between its two projections, fused: rotation, decay, retention, norm and gate.

out = silu(g) * RMS(retention(R q, R k, v, logsigmoid(logits) / tau))      (paper section 3, equations 5-8)

`triton.mix` needs what the retention backend "triton" needs; elsewhere the layer runs these steps one by one.
"""
