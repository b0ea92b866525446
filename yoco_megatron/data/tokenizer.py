"""Tokenizers: trained with Hugging Face tokenizers, saved as a Hugging Face folder, built by Megatron's own builder.

The same folder serves preprocessing, training (`--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER`) and
the exported checkpoint. Which tokenizer a `--tokenizer-type` means is decided in megatron.core.tokenizers alone.
"""

import argparse
import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from yoco_megatron.data.readers import check_keys, read_batches

EOD = "<|endoftext|>"
# Its own id: GPTDataset takes labels equal to the pad id out of the loss, and cannot pad at all without one.
PAD = "<|pad|>"
SPECIAL_TOKENS = [EOD, PAD]
# Every byte has a token, so that any text can be encoded.
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
OF_A_MODEL = frozenset({"HuggingFaceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer", "TikTokenizer"})
# Of a Hugging Face folder without a tokenizer.json.
SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def train_tokenizer(corpus: list[Path], vocab_size: int, output: Path, key: str = "text") -> int:
    """Train a byte-level BPE on a corpus and save it as the Hugging Face folder `output`.

    Ids 0 and 1 are <|endoftext|> (eos) and <|pad|>. The same text gives the same tokenizer.json, byte for byte.

    Args:
        corpus: files, as preprocessing reads them.
        vocab_size: of the whole vocabulary, special tokens included.
        output: folder; files of an earlier tokenizer in it are replaced.
        key: where a record holds its text.
    Returns:
        The size of the vocabulary: `vocab_size`, or less if the corpus is too small for so many merges.
    Raises:
        ValueError: a vocabulary smaller than the bytes, or a record without text.
    """
    from tokenizers import pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"--vocab-size {vocab_size} is too small; 256 bytes and 2 special tokens need {MIN_VOCAB_SIZE}"
        )
    tokenizer = _of_bytes(None)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus, key), trainer)
    _save(tokenizer, output)
    return tokenizer.get_vocab_size()


def byte_tokenizer(output: Path) -> int:
    """Save the tokenizer of bytes as the Hugging Face folder `output`: ids 0 to 255 are the bytes of UTF-8 text.

    256 is <|endoftext|> (eos), 257 <|pad|>. Texts have the ids of megatron.core's ByteLevelTokenizer, which no
    --tokenizer-type builds, and whose end of document and padding are the bytes 0 and 1.

    Returns:
        The size of the vocabulary.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    # The characters that stand for bytes: printable ones for themselves, the others, in order, for those from 256 on.
    alphabet = sorted(ByteLevel.alphabet())
    own = [char for char in alphabet if ord(char) < 256]
    others = iter(char for char in alphabet if ord(char) >= 256)
    vocabulary = {chr(byte) if chr(byte) in own else next(others): byte for byte in range(256)}
    tokenizer = _of_bytes(vocabulary)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    _save(tokenizer, output)
    return tokenizer.get_vocab_size()


def _of_bytes(vocabulary: dict[str, int] | None) -> Any:
    """A byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE() if vocabulary is None else models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _save(tokenizer: Any, output: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    aside = output.with_name(output.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOD, pad_token=PAD).save_pretrained(aside)
    _move_files(aside, output)


def _texts(corpus: list[Path], key: str) -> Iterator[str]:
    check_keys(corpus, [key])
    total = sum(path.stat().st_size for path in corpus)
    with tqdm(total=total, desc="train tokenizer", unit="B", unit_scale=True, disable=None) as progress:
        for batch in read_batches(corpus, [key]):
            good, _, bad = batch.texts([key])
            if bad:
                index, reason = bad[0]
                raise ValueError(f"--input {batch.place(index)}: {reason}")
            for (text,) in good:
                yield text.decode()
            progress.update(batch.done - progress.n)
        progress.set_postfix_str("merging")


def _move_files(source: Path, target: Path) -> None:
    """Move the files of one folder into another, tokenizer.json last: it is what makes the folder a tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "tokenizer.json"):
        path.replace(target / path.name)
    source.rmdir()


def add_tokenizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Megatron's own tokenizer flags (--tokenizer-type, --tokenizer-model, ...), the same as in pretraining."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")


def check_flags(args: Any) -> None:
    """Raises ValueError for tokenizer flags that name none."""
    if args.tokenizer_type is None:
        raise ValueError(
            "--tokenizer-type is missing; for a folder with a tokenizer.json it is HuggingFaceTokenizer, for mock data "
            "NullTokenizer"
        )
    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise ValueError("--vocab-size is missing: --tokenizer-type NullTokenizer knows no words")
    model = args.tokenizer_model
    if model is None and args.tokenizer_type in OF_A_MODEL:
        raise ValueError(f"--tokenizer-model is missing: the file or folder of --tokenizer-type {args.tokenizer_type}")
    # A name on the Hugging Face hub has one slash at most: do not search the network for what must be a path.
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
    args.pad_vocab_size = False  # the padded size belongs to a model and its parallelism; data have neither
    try:
        return build(args)
    except Exception as error:  # every tokenizer library has its own ways to fail
        here = " (no such file or folder here)" if missing else ""
        raise ValueError(
            f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {model}{here} cannot be loaded: {error}"
        ) from error


def tokenizer_sha256(path: str | None) -> str | None:
    """SHA-256, in hex, of what a tokenizer means: the folder of a Hugging Face one, or the one file of another library.

    A tokenizer.json that was saved again, by another version or after a use that truncated, has the same one. None if
    there is no such file here (a name on the hub).
    """
    if path is None or not Path(path).exists():
        return None
    if Path(path).is_file():
        files = [Path(path)]
    else:
        files = [Path(path) / "tokenizer.json"]
        if not files[0].exists():  # what tokenizers without one are made of
            files = [file for name in SLOW_FILES if (file := Path(path) / name).exists()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(_meaning(file) if file.name == "tokenizer.json" else file.read_bytes())
    return digest.hexdigest() if files else None


def _meaning(file: Path) -> bytes:
    """A tokenizer.json in one spelling, without the padding and truncation of its last use."""
    content = json.loads(file.read_bytes())
    content |= {"padding": None, "truncation": None}
    model = content.get("model", {})
    if "merges" in model:  # of old, "a b"
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    return json.dumps(content, sort_keys=True).encode()
