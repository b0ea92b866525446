"""Kernels, a folder each: a float64 reference, plain torch, Triton where it pays. No module, no rank."""
