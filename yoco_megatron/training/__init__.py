"""What Megatron's training loop calls back. There is no loop here."""
