"""How a YOCO is spread over processes where Megatron alone cannot: the shared K,V between pipeline stages."""
