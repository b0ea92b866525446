"""A YOCO of a Transformer's weights. Here: names of the command line, without the code, which is slow to import."""

SHARED_KV_FROM = ("first", "middle", "last", "mean")
MIXERS = ("gated_retention", "sliding_window")
"""Of the self-decoder, that can be made of a teacher's attention."""
