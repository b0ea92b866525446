"""Tokenizer flags: checking them, building the tokenizer with Megatron's own builder, and hashing its content.

Which tokenizer a `--tokenizer-type` means is decided in megatron.core.tokenizers alone. Training one:
yoco_megatron/corpus/tokenizer_training.py.
"""

import argparse
import copy
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

NEEDS_MODEL = frozenset({"HuggingFaceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"})
# Files of a Hugging Face tokenizer without a tokenizer.json.
SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Megatron's own tokenizer flags (--tokenizer-type, --tokenizer-model, ...), the same as in pretraining."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")


def check_flags(args: Any) -> None:
    """Raises ValueError for flags that do not name a tokenizer."""
    if args.tokenizer_type is None:
        raise ValueError(
            "--tokenizer-type is missing; for a folder with a tokenizer.json it is HuggingFaceTokenizer, for mock data "
            "NullTokenizer"
        )
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise ValueError("--vocab-size is missing: --tokenizer-type NullTokenizer has no vocabulary of its own")
    model = args.tokenizer_model
    if model is None and args.tokenizer_type in NEEDS_MODEL:
        raise ValueError(f"--tokenizer-model is missing: the file or folder of --tokenizer-type {args.tokenizer_type}")
    # A name on the Hugging Face hub has at most one slash: do not look up a path on the network.
    if model and not Path(model).exists() and (model.startswith((".", "/")) or model.count("/") > 1):
        raise ValueError(f"--tokenizer-model {model} does not exist; give the folder of the tokenizer.json")


def build_tokenizer(args: Any) -> Any:
    """Megatron's tokenizer for the flags `args` (a parsed namespace or a megatron.training TokenizerConfig).

    Raises:
        ValueError: no --tokenizer-type, or a tokenizer that cannot be loaded.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    check_flags(args)
    model = args.tokenizer_model
    missing = model is not None and not Path(model).exists()
    args = copy.copy(args)
    args.pad_vocab_size = False  # the padded size depends on a model and its parallelism; data have neither
    try:
        return build(args)
    except Exception as error:  # each tokenizer library raises its own types
        here = " (no such file or folder here)" if missing else ""
        raise ValueError(
            f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {model}{here} cannot be loaded: {error}"
        ) from error


def template_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(prefix, suffix): the ids that the template of a transformers tokenizer puts before and after every text.

    Raises:
        ValueError: a template that does something else.
    """
    bare: list[int] = []
    # A vocabulary of another script may have no "x".
    some = (tokenizer.decode([id_], skip_special_tokens=True) for id_ in range(min(len(tokenizer), 1000)))
    for text in itertools.chain(["x"], some):
        bare, full = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        if bare or not full:
            break
    if bare or full:
        raise ValueError(
            "--tokenizer-model: the tokenizer's template (post_processor) does more than to put tokens around a text; "
            "add --tokenizer-hf-no-include-special-tokens to do without it"
        )
    return [], []


def tokenizer_sha256(path: str | None) -> str | None:
    """SHA-256, in hex, of a tokenizer's content: a Hugging Face folder, or the one file of another library.

    It does not change when a tokenizer.json is saved again, by another version or with truncation. None if there is no
    such file here (a name on the hub).
    """
    if path is None or not Path(path).exists():
        return None
    if Path(path).is_file():
        files = [Path(path)]
    else:
        files = [Path(path) / "tokenizer.json"]
        if not files[0].exists():
            files = [file for name in SLOW_FILES if (file := Path(path) / name).exists()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(_canonical(file) if file.name == "tokenizer.json" else file.read_bytes())
    return digest.hexdigest() if files else None


def _canonical(file: Path) -> bytes:
    """The content of a tokenizer.json in canonical form, without the padding and truncation of its last use."""
    content = json.loads(file.read_bytes())
    content |= {"padding": None, "truncation": None}
    model = content.get("model", {})
    if "merges" in model:  # older files: "a b"
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return json.dumps(content, sort_keys=True).encode()
