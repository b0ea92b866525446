"""Names of the formats that are read and written, apart from the code that does it, which is slow to import."""

SOURCES = ("megatron", "hf", "fla", "official")
TARGETS = ("megatron", "hf", "fla")
