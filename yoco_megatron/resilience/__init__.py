"""What lets a run outlive the machines it runs on: the run folder, exit policy, guards, and hooks into Megatron's loop.

`run_folder`, `outcome` and `policy` need nothing but Python, so that launchers can ask them on a login node.
"""
