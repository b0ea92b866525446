"""The YOCO that ships inside exported checkpoints: transformers alone, nothing of this package."""
