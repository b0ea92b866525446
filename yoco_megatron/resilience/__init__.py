"""Runs that survive faults: run folder, exit records and policy, preflight, divergence guard, hang watchdog, triggers.

`run_folder`, `exit_record` and `policy` are plain Python, so that launchers can use them on a login node.
"""
