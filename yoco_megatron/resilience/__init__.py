"""Runs that survive faults: run folder and lock, exit records and policy, preflight, guard, hang watchdog, triggers.

`run_folder`, `run_lock`, `exit_record`, `records` and `policy` are plain Python, so that launchers can use them on a
login node.
"""
