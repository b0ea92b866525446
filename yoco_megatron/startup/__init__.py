"""From a command line to a run: the only room below the entry that sees all of it."""
