"""Text generation: the prompt in chunks, without the cross-decoder, then one token at a time.

The engine serves prompts of one length on a GPU; elsewhere transformers' own caches do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from yoco_megatron.inference.engine import PREFILL_CHUNK, Engine, forward, has_kernels
from yoco_megatron.inference.quantized_cache import dynamic_cache
from yoco_megatron.inference.uncached import UncachedDecoder


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled. Temperature 0 takes the most likely one.

    `top_p` restricts sampling to the smallest set of likeliest tokens whose probabilities sum to at least top_p; ids
    from `vocab_size` on (padding of the vocabulary) are never sampled.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-3 <= self.temperature <= 1e3:  # NaN neither; beyond, logits overflow
            raise ValueError(
                f"--temperature {self.temperature} must be from 0.001 to 1000, or 0 for the most likely token"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} must be a whole number from 0 to 2^63 - 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p} must be above 0 and at most 1")

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
    """(ids, mask), int64 [B, longest]; mask is 0 on the left padding of shorter prompts."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


class CachedModel:
    """A model with transformers' own cache: any device, prompts of different lengths in one batch.

    Args:
        prefill_chunk: tokens of each prompt per forward pass.
        kv_cache_dtype: of the shared K,V, see `dynamic_cache`.
    """

    def __init__(
        self, model: PreTrainedModel, prefill_chunk: int = PREFILL_CHUNK, kv_cache_dtype: str | None = None
    ) -> None:
        self.model, self.prefill_chunk = model, prefill_chunk
        self.cache = dynamic_cache(model.config, kv_cache_dtype)
        self.mask: Tensor | None = None
        self.length = 0

    def prefill(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run prompts [B, T], `prefill_chunk` tokens at a time; returns logits [B, vocabulary] after the last one.

        All but the last position skip the cross-decoder. `mask` [B, T] is 0 on padding.
        """
        self.mask = mask
        *chunks, last = ids.split(self.prefill_chunk, dim=1)
        for chunk in chunks:
            self._forward(chunk, last=False)
        return self._forward(last)

    def step(self, tokens: Tensor) -> Tensor:
        """Run one token [B] of every sequence; returns logits [B, vocabulary] after it."""
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(tokens), 1)), dim=1)
        return self._forward(tokens[:, None])

    @torch.no_grad()
    def _forward(self, ids: Tensor, last: bool = True) -> Any:
        return forward(self.model, ids, last, **self._places(ids))

    def _places(self, ids: Tensor) -> dict[str, Any]:
        """The model's arguments for these tokens, which are counted."""
        start, self.length = self.length, self.length + ids.shape[1]
        return dict(
            attention_mask=None if self.mask is None else self.mask[:, : self.length],
            position_ids=torch.arange(start, self.length, device=ids.device)[None],
            past_key_values=self.cache,
        )

    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        return bytes_of(self.cache.layers)


def bytes_of(layers: list[Any]) -> int:
    """Bytes of all tensors in layers of transformers' caches."""
    tensors: dict[int, Tensor] = {}
    for layer in layers:
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        for states in ("recurrent_states", "conv_states"):
            held += getattr(layer, states, {}).values()
        tensors |= {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


Decoder = CachedModel | Engine | UncachedDecoder


def decoder_for(
    model: PreTrainedModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    prefill_chunk: int = PREFILL_CHUNK,
    kv_cache_dtype: str | None = None,
) -> CachedModel | Engine:
    """The engine where it applies (on a GPU, prompts of one length, supported heads); else transformers' own caches."""
    lengths = set(map(len, prompts))
    if next(model.parameters()).is_cuda and len(lengths) == 1 and has_kernels(model.config):
        most = max(lengths) + max_new_tokens
        return Engine(model, most, prefill_chunk=prefill_chunk, kv_cache_dtype=kv_cache_dtype)
    return CachedModel(model, prefill_chunk, kv_cache_dtype)


def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    end: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, step by step; None for one that has ended.

    Args:
        decoder: an unused one (`decoder_for`).
        prompts: token ids, at least one each; lengths may differ.
        end: the id that ends a text (it is not yielded).
    Raises:
        ValueError: an empty prompt.
    """
    if not prompts or not all(prompts):
        raise ValueError("--prompt has no token; give at least one character")
    device = next(decoder.model.parameters()).device
    ids, mask = left_padded(prompts, device)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    logits = decoder.prefill(ids, None if mask.all() else mask)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for number in range(max_new_tokens):
        tokens = sampling.draw(logits, generator)
        ended |= (tokens == end).cpu() if end is not None else False
        if ended.all():
            return
        yield [None if done else token for done, token in zip(ended.tolist(), tokens.tolist())]
        if number + 1 < max_new_tokens:
            logits = decoder.step(tokens)
