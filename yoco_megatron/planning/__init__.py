"""Before a run: the best mesh, where bytes and milliseconds go, days and failures. Loads neither torch nor Megatron."""
