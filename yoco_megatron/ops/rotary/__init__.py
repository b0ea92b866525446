"""Rotation of interleaved pairs on a GPU: see triton.py."""
