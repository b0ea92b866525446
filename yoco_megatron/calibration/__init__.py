"""`tools/plan.py calibrate`: the figures of a card, measured on the GPUs of one node or more."""
