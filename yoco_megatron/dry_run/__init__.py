"""The real trainer as single ranks of a world that does not exist: fake tensors, no peers, a ledger of calls."""
