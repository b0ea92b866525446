"""What a model costs: parameters, FLOPs, memory, traffic, time. Pure arithmetic on sizes; no torch, no process."""
