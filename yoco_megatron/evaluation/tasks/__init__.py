"""The tasks, a file each. A task is a frozen dataclass: its fields are the settings that a suite may give."""

TASKS: dict[str, str] = {}
"""Name of a task in a suite -> its module and class, imported when a suite names it."""
