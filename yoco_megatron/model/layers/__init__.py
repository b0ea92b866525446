"""The parts of which both halves are made."""
