"""Copies and loads the tokenizer files of a model, without running the model's code."""

import shutil
from pathlib import Path
from typing import Any

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def load(folder: Path) -> Any:
    """The Hugging Face tokenizer in `folder`.

    AutoTokenizer would read the model's config first and ask whether to run its code. Raises ValueError.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {folder}: no tokenizer can be loaded from there: {error}") from None


def copy(source: Path, folder: Path) -> Any:
    """Copy the files; returns the tokenizer loaded from the copy."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    return load(folder)
