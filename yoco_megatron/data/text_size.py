"""How many bytes of text a token of validation data stands for: bits per byte compare models of any tokenizer.

Counted in evenly spaced samples, of the labels that have a loss.
"""

import math
from argparse import Namespace
from typing import Any

from yoco_megatron.data.tokenizer import special_tokens
from yoco_megatron.data.validation_sets import ValidationSets

MOST_TOKENS = 1 << 17
"""That are read of a set: a fraction of a second, and a thousandth of an error in a text that is alike everywhere."""


def bytes_per_token(dataset: Any, tokenizer: Any, most_tokens: int = MOST_TOKENS) -> float | None:
    """UTF-8 bytes of text per label with a loss, special tokens counted as labels without text; None without text."""
    tokens, size, special = 0, 0, special_tokens(tokenizer)
    count = min(len(dataset), max(1, most_tokens // len(dataset[0]["labels"])))
    for number in range(count):
        sample = dataset[number * len(dataset) // count]
        labels = sample["labels"][sample["loss_mask"] > 0].tolist()
        tokens += len(labels)
        size += _bytes(tokenizer.detokenize([label for label in labels if label not in special]))
    return size / tokens if size else None


def _bytes(text: str) -> int:
    """UTF-8 bytes of `text`; of a character that its beginning or end cuts, each byte has become U+FFFD."""
    whole = text.strip("\ufffd")
    return len(whole.encode()) + len(text) - len(whole)


def of_validation(args: Namespace, valid: Any, tokenizer: Any) -> dict[str, float]:
    """Bytes per token of each validation set, by what Megatron adds to `validation` in its name: "", or "-NAME".

    None are known of mock data, and of a tokenizer whose tokens are no text.
    """
    if valid is None or args.mock_data or args.tokenizer_type.startswith("Null"):
        return {}
    sets = valid.sets if isinstance(valid, ValidationSets) else [valid]
    names = [f"-{name}" for name in args.validation_sets] if args.validation_sets else [""]
    found = {name: bytes_per_token(dataset, tokenizer) for name, dataset in zip(names, sets) if len(dataset)}
    return {name: size for name, size in found.items() if size is not None}


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Of a loss."""
    return nats_per_token / math.log(2) / bytes_per_token
