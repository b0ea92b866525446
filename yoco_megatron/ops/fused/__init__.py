"""Elementwise kernels around the matrix products: rotary embedding, SwiGLU, and all of a retention layer between its
two projections."""
