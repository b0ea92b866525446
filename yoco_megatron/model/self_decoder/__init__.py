"""The mixers of the self-decoder's layers."""
