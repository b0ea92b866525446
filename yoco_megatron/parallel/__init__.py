"""How a YOCO is spread over processes where Megatron alone cannot: pipeline stages, and sequences over ranks."""
