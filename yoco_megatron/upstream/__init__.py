"""Every change of Megatron, torch and Transformer Engine."""
