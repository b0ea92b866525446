"""One record for each mixer of the self-decoder."""
