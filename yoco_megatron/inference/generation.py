"""Text from a trained model: the prompt once, in pieces and without the cross-decoder, then one token at a time.

Works with any cache of transformers' interface; `DynamicCache` holds the windows or states and the one K,V.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

PIECE = 32768


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 takes the most likely one.

    `top_p` keeps the smallest set of likeliest tokens whose probabilities sum to at least top_p; ids from `vocab_size`
    on (rows that pad the vocabulary) are never drawn.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature} must not be negative; 0 takes the most likely token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} must lie above 0 and at most at 1")

    def draw(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """Token ids [B] from logits [B, vocabulary]."""
        logits_BV = logits_BV[:, : self.vocab_size].float()
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        probabilities, ids = (logits_BV / self.temperature).softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


def left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [B, longest]; mask is 0 where a shorter prompt was filled up in front."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


@torch.no_grad()
def prefill(model: torch.nn.Module, ids: Tensor, mask: Tensor | None, cache: Cache, piece: int = PIECE) -> Tensor:
    """Fill `cache` with prompts [B, T], `piece` tokens at a time; logits [B, vocabulary] after the last one.

    Each piece leaves the model before the cross-decoder, but for its last position.
    """
    start = 0
    for part in ids.split(piece, dim=1):
        end = start + part.shape[1]
        positions = torch.arange(start, end, device=ids.device)[None]
        seen = None if mask is None else mask[:, :end]
        logits = model(
            part, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        start = end
    return logits[:, -1]


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    end: int | None = None,
    cache: Cache | None = None,
    piece: int = PIECE,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, step by step; None for one that has ended.

    Args:
        prompts: token ids, each at least one; lengths may differ.
        end: the id that ends a text (it is not yielded).
        cache: an empty one to fill; a DynamicCache by default.
        piece: tokens of the prompts that are prefilled at a time.
    Raises:
        ValueError: an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("--prompt has no token; give at least one character")
    device = next(model.parameters()).device
    ids, mask = left_padded(prompts, device)
    ragged = len(set(map(len, prompts))) > 1
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = prefill(model, ids, mask if ragged else None, cache, piece)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for step in range(max_new_tokens):
        tokens = sampling.draw(logits, generator)
        ended |= (tokens == end).cpu() if end is not None else False
        if ended.all():
            return
        yield [None if done else token for done, token in zip(ended.tolist(), tokens.tolist())]
        if step + 1 == max_new_tokens:
            return
        mask = torch.cat((mask, mask.new_ones(len(prompts), 1)), dim=1)
        logits = model(
            tokens[:, None],
            attention_mask=mask if ragged else None,
            position_ids=torch.tensor([[ids.shape[1] + step]], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


def cache_bytes(cache: Cache) -> int:
    """Bytes of the tensors in a cache, all layers."""
    tensors: dict[int, Tensor] = {}
    for layer in cache.layers:
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += getattr(layer, "recurrent_states", {}).values()
        tensors |= {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
