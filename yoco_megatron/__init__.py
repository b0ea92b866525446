"""YOCO (You Only Cache Once, arXiv 2405.05254) pretraining on Megatron-Core."""

__version__ = "0.1.0"
