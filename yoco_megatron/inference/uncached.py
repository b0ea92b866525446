"""Decoding for the Transformer baseline: the whole sequence again for each token.

No KV cache is implemented for Megatron's own GPT; only YOCO has one here.
"""

import torch
from torch import Tensor


class UncachedDecoder:
    """A decoder for `generate` around a training model (Megatron's); all prompts have one length."""

    def __init__(self, model: torch.nn.Module, max_length: int) -> None:
        self.model, self.max_length = model, max_length

    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Take prompts [B, T]; logits [B, vocabulary] after the last token."""
        if mask is not None:
            raise ValueError("--prompt: several prompts for a Transformer baseline must have equally many tokens")
        self.ids = ids
        return self._run()

    def step(self, tokens: Tensor) -> Tensor:
        """Take one token [B] of every sequence; logits [B, vocabulary] after it."""
        self.ids = torch.cat((self.ids, tokens[:, None]), dim=1)
        return self._run()

    @torch.no_grad()
    def _run(self) -> Tensor:
        return self.model(self.ids[:, -self.max_length :], None, None)[:, -1]

    def nbytes(self) -> int:
        """Bytes that the cache holds: 0."""
        return 0
