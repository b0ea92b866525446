"""Checkpoints from one format to another. Here: the names of the formats, without the code, which is slow to import."""

SOURCES = ("megatron", "hf", "fla", "official")
TARGETS = ("megatron", "hf", "fla")
