"""One process: transformers' YOCO with its caches, on a CPU or a GPU.

* Generation runs a prompt without the cross-decoder (its last position aside), then token by token.
* The choices of a document share its context: self-decoder and shared K,V run over it once, the cross-decoder only at
  the choices' tokens.

Nothing is padded on the left, and what is padded on the right comes after all that is read. So an answer does not
depend on what is in a batch beside it, except by rounding: kernels may sum in another order for other shapes. In fp32
that moves a loss by some 1e-6; in bf16 by some 1e-2, and the likelier of two tokens that are so close can change.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from yoco_megatron.evaluation.backends.batching import batches, in_order
from yoco_megatron.evaluation.backends.logits import ROWS, excluded_ids, read_logits
from yoco_megatron.evaluation.requests import Generate, Likelihood, Score, Tokenizer, TokenLosses
from yoco_megatron.inference.cache import IMPLEMENTATION, BlockCache
from yoco_megatron.inference.engine import PREFILL_CHUNK
from yoco_megatron.inference.generation import decoder_for
from yoco_megatron.inference.quantized_cache import dynamic_cache

SPREAD = 64
"""By how much the prompts of a batch may differ in length: the ends of longer ones are taken token by token."""


class CachedBackend:
    """Answers requests with a YOCO of transformers' interface.

    Args:
        model: in evaluation mode.
        vocab_size: ids from it on are padding of the vocabulary, and in no continuation; None for none.
        token_budget: tokens of a batch.
        prefill_chunk: tokens of each sequence in one forward pass.
        kv_cache_dtype: of the shared K,V (`ops.attention.quantized.FORMATS`); None for the model's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None,
        vocab_size: int | None = None,
        name: str = "one process",
        token_budget: int = PREFILL_CHUNK,
        prefill_chunk: int = PREFILL_CHUNK,
        kv_cache_dtype: str | None = None,
    ) -> None:
        self.kv_cache_dtype = kv_cache_dtype
        self.model, self.vocab_size, self.name = model, vocab_size, name
        self.tokenizer: Any = tokenizer
        self.max_length: int = model.config.max_position_embeddings
        self.token_budget, self.prefill_chunk = token_budget, prefill_chunk
        self.device = next(model.parameters()).device
        self._attention = model.config._attn_implementation  # the engine sets its own

    # -- generation

    def generate(self, requests: Sequence[Generate]) -> Iterator[list[int]]:
        """The greedy continuation of each prompt."""
        return in_order(requests, lambda one: len(one.prompt) + one.max_new_tokens, self.max_length, self._generate)

    @torch.no_grad()
    def _generate(self, requests: list[Generate]) -> Iterator[tuple[int, list[int]]]:
        lengths = [len(one.prompt) for one in requests]
        costs = [len(one.prompt) + one.max_new_tokens for one in requests]
        for batch in batches([one.banned for one in requests], lengths, costs, self.token_budget, SPREAD):
            yield from zip(batch, self._continue([requests[index] for index in batch]))

    def _continue(self, requests: list[Generate]) -> list[list[int]]:
        shortest = min(len(one.prompt) for one in requests)
        assert shortest, "a prompt needs at least one token"
        end = max(len(one.prompt) + one.max_new_tokens for one in requests)
        self.model.set_attn_implementation(self._attention)
        prompts = [list(one.prompt[:shortest]) for one in requests]
        decoder = decoder_for(self.model, prompts, end - shortest, self.prefill_chunk, self.kv_cache_dtype)
        excluded = self._excluded(requests[0].banned)
        logits = decoder.prefill(torch.tensor([one.prompt[:shortest] for one in requests], device=self.device))
        new: list[list[int]] = [[] for _ in requests]
        left = {row for row, one in enumerate(requests) if one.max_new_tokens}
        for position in range(shortest, end):
            likeliest = logits.float().masked_fill(excluded, -torch.inf).argmax(-1).tolist()
            tokens = []
            for row, (one, token) in enumerate(zip(requests, likeliest)):
                if position < len(one.prompt):
                    token = one.prompt[position]
                elif row in left:
                    if token not in one.stop:
                        new[row].append(token)
                    if token in one.stop or len(new[row]) == one.max_new_tokens:
                        left.remove(row)
                tokens.append(token)
            if not left:
                break
            logits = decoder.step(torch.tensor(tokens, device=self.device))
        return new

    # -- likelihoods of choices

    def score(self, requests: Sequence[Score]) -> Iterator[list[Likelihood]]:
        """The likelihoods of each request's continuations."""

        def length(one: Score) -> int:
            return len(one.context) + max(map(len, one.continuations))

        return in_order(requests, length, self.max_length, self._score)

    @torch.no_grad()
    def _score(self, requests: list[Score]) -> Iterator[tuple[int, list[Likelihood]]]:
        contexts = [len(one.context) for one in requests]
        costs = [(len(one.context) + max(map(len, one.continuations))) * len(one.continuations) for one in requests]
        for batch in batches(contexts, contexts, costs, self.token_budget):
            yield from zip(batch, self._likelihoods([requests[index] for index in batch]))

    def _likelihoods(self, requests: list[Score]) -> list[list[Likelihood]]:
        """Of requests whose contexts have equal lengths."""
        self.model.set_attn_implementation(self._attention)
        *_, last = contexts = torch.tensor([one.context for one in requests], device=self.device).unbind(1)
        cache = dynamic_cache(self.model.config, self.kv_cache_dtype)
        if len(contexts) > 1:
            self._hidden(torch.stack(contexts[:-1], 1), cache, None)
        choices = [choice for one in requests for choice in one.continuations]
        rows = [row for row, one in enumerate(requests) for _ in one.continuations]
        document: Any = torch.tensor(rows, device=self.device)
        cache.reorder_cache(document)
        labels = self._right_padded(choices)
        ids = torch.cat((last[document, None], labels[:, :-1]), 1)
        losses, likeliest = self._read(self._hidden(ids, cache, ids.shape[1]), labels)
        found = [
            Likelihood(-float(loss[: len(choice)].sum(dtype=np.float64)), tuple(best[: len(choice)]) == choice)
            for choice, loss, best in zip(choices, losses, likeliest)
        ]
        ends = np.cumsum([len(one.continuations) for one in requests])
        return [found[end - len(one.continuations) : end] for one, end in zip(requests, ends)]

    # -- losses of tokens

    def token_losses(self, requests: Sequence[TokenLosses]) -> Iterator[np.ndarray]:
        """fp32 losses of each request's tokens from `first` on."""
        return in_order(requests, lambda one: len(one.tokens), self.max_length, self._token_losses)

    @torch.no_grad()
    def _token_losses(self, requests: list[TokenLosses]) -> Iterator[tuple[int, np.ndarray]]:
        lengths = [len(one.tokens) for one in requests]
        for batch in batches([None] * len(requests), lengths, lengths, self.token_budget, self.token_budget):
            yield from zip(batch, self._losses([requests[index] for index in batch]))

    def _losses(self, requests: list[TokenLosses]) -> list[np.ndarray]:
        """In chunks, as the engine takes a prompt; the cross-decoder begins where losses do."""
        self.model.set_attn_implementation(IMPLEMENTATION)
        tokens = self._right_padded([one.tokens for one in requests])
        ids, labels = tokens[:, :-1], tokens[:, 1:]
        cache = BlockCache(self.model.config, ids.shape[1], reserve=True, kv_cache_dtype=self.kv_cache_dtype)
        first = min(one.first for one in requests) - 1
        found = []
        for start in range(0, ids.shape[1], self.prefill_chunk):
            chunk = ids[:, start : start + self.prefill_chunk]
            stop = start + chunk.shape[1]
            asked = min(stop - first, chunk.shape[1])
            # A single query would be a decoding step, whose kernel does not take all widths of heads.
            computed = None if asked <= 0 else max(asked, min(2, chunk.shape[1]))
            positions = torch.arange(start, stop, device=self.device)[None]
            hidden = self._hidden(chunk, cache, computed, position_ids=positions)
            cache.advance(chunk.shape[1])
            if computed is not None:
                found.append(self._read(hidden[:, -asked:], labels[:, stop - asked : stop])[0])
        losses = np.concatenate(found, 1)
        return [losses[row, one.first - 1 - first : len(one.tokens) - 1 - first] for row, one in enumerate(requests)]

    # -- the model

    def _hidden(self, ids: Tensor, cache: Any, cross_positions: int | None, **more: Any) -> Tensor:
        """Hidden states of the last `cross_positions` of tokens [b, s]; the cache takes all of them."""
        return self.model.base_model(
            ids, use_cache=True, past_key_values=cache, cross_positions=cross_positions, **more
        ).last_hidden_state

    def _read(self, hidden: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(losses fp32, likeliest ids) [b, s]."""
        excluded = self._excluded(())
        parts = zip(hidden.flatten(0, 1).split(ROWS), labels.flatten().split(ROWS))
        read = [read_logits(self.model.lm_head(few), these, excluded) for few, these in parts]
        losses, ids = (torch.cat(found).view_as(labels).cpu().numpy() for found in zip(*read))
        return losses, ids

    def _excluded(self, banned: Any) -> Tensor:
        return excluded_ids(banned, self.vocab_size, 0, self.model.config.vocab_size, self.device)

    def _right_padded(self, rows: Sequence[Any]) -> Tensor:
        padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
        for row, ids in zip(padded, rows):
            row[: len(ids)] = ids
        return torch.from_numpy(padded).to(self.device)
