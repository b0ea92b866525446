"""A Hugging Face tokenizer as evaluation tasks see it."""

from collections.abc import Sequence
from typing import Any

from yoco_megatron.convert import tokenizer_files
from yoco_megatron.data.tokenizer import template_ids, tokenizer_sha256
from yoco_megatron.utils.errors import require


class TextTokenizer:
    """Wraps a transformers tokenizer, whose template begins texts as training did (convert/tokenizer_files.load)."""

    def __init__(self, tokenizer: Any) -> None:
        self.wrapped = tokenizer
        self.start: tuple[int, ...] = tuple(template_ids(tokenizer)[0])
        self.end: int | None = tokenizer.eos_token_id
        self.rows = tokenizer_files.rows(tokenizer)
        self.sha256 = tokenizer_sha256(tokenizer.name_or_path or None)
        self.banned = frozenset({tokenizer.bos_token_id, tokenizer.pad_token_id} - {None, self.end})

    @classmethod
    def of_model(cls, folder: str, tokenizer: Any) -> "TextTokenizer":
        """That of the model in `folder`. Raises ValueError where it is None."""
        require(
            tokenizer is not None,
            f"{folder}: the model has no Hugging Face tokenizer, so it cannot read text: name one with --tokenizer",
        )
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone; what looks like a special token in it is one, as in training."""
        return self.wrapped(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out, all spaces kept: bytes of the text are counted."""
        return self.wrapped.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
