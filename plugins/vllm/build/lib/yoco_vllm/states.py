"""Gated retention of one step of vLLM over the states of all its sequences: torch and kernels, without vLLM.

A step has tokens of many sequences: those that decode, one token each, then those whose prompt, or its next piece, is
read. Between steps a sequence's state lies in a slot, which held another sequence before.
"""

from typing import Protocol

import torch
from torch import Tensor

from yoco_megatron.ops.gated_retention import gated_retention, step


class Batch(Protocol):
    """What is read of vLLM's LinearAttentionMetadata: integers [sequences], `query_start_loc` [sequences + 1]."""

    num_decodes: int
    num_prefills: int
    query_start_loc: Tensor
    seq_lens: Tensor  # up to and with this step
    state_indices_tensor: Tensor


def retain(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, states: Tensor, batch: Batch) -> Tensor:
    """o [t, H, D] of q, k, v [t, H, D] and fp32 log_decay [t, H]; `states` [slots, H, D, D], fp32, change in place.

    Rows and sequences that only pad a batch may follow; the rows are 0.
    """
    out = torch.zeros_like(v)
    slots = batch.state_indices_tensor.clamp(min=0)  # -1 is padding; slot 0 is vLLM's own, which nobody reads
    # A sequence's first piece, a prompt of one token among the decodes too, must not see what the slot held.
    first = batch.seq_lens == batch.query_start_loc.diff()
    states_before = states[slots].masked_fill_(first[:, None, None, None], 0)
    n = batch.num_decodes
    if n:
        one = (x[:n] for x in (q, k, v, log_decay))
        out[:n], states[slots[:n]] = step(*one, states_before[:n], in_place=True)
    if batch.num_prefills:
        bounds = batch.query_start_loc.tolist()
        for i in range(n, n + batch.num_prefills):
            piece = slice(bounds[i], bounds[i + 1])
            if piece.start < piece.stop:
                rows = (x[None, piece] for x in (q, k, v, log_decay))
                o, after = gated_retention(*rows, initial_state=states_before[i : i + 1])
                out[piece], states[slots[i]] = o[0], after[0]
    return out
