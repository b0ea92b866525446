"""The YOCO that ships inside exported checkpoints: torch and transformers, optionally our kernels."""
