"""The model cut into pipeline stages; hidden states and the shared K,V between them."""
