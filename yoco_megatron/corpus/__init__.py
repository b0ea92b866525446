"""From text to Megatron's indexed datasets, before training."""
