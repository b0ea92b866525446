"""What answers the requests of tasks: one process with caches, or Megatron's model on any mesh."""
