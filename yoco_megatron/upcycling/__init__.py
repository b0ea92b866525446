"""A YOCO of a Transformer's weights. Here: names of the command line, without the code, which is slow to import."""

SHARED_KV_FROM = ("first", "middle", "last", "mean")
