"""Text from a trained model, one token at a time, by running the whole sequence again for each token.

Slow and plainly right: no cache of any kind. Good for looking at a training run.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def next_token(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one token id from logits [vocabulary]; temperature 0 takes the most likely.

    `top_p` keeps the smallest set of likeliest tokens whose probabilities sum to at least top_p.
    """
    if temperature == 0:
        return logits_V.argmax()
    probabilities, ids = (logits_V.float() / temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return ids[torch.multinomial(probabilities, 1, generator=generator)[0]]


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    prompt: list[int],
    max_new_tokens: int,
    *,
    max_length: int,
    vocab_size: int,
    end: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield new token ids after `prompt` (at least one id), until `end` or `max_new_tokens`.

    Args:
        max_length: tokens of context that the model sees at most; earlier ones are cut off.
        vocab_size: ids below this are real; the padding of the vocabulary is never drawn.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        logits = model(tokens[:, -max_length:], None, None)[0, -1, :vocab_size]
        token = next_token(logits, temperature, top_p, generator)
        if token.item() == end:
            return
        yield token.item()
        tokens = torch.cat((tokens, token.view(1, 1)), dim=1)
