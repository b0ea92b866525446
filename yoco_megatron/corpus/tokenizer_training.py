"""A byte-level BPE, trained with Hugging Face tokenizers and saved as a Hugging Face folder.

The same folder serves preprocessing, training (`--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER`) and
the exported checkpoint.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yoco_megatron.corpus.readers import check_keys, read_batches
from yoco_megatron.utils.progress import progress

EOD = "<|endoftext|>"
# Its own id: GPTDataset masks the loss of labels equal to the pad id, and cannot pad without one.
PAD = "<|pad|>"
SPECIAL_TOKENS = [EOD, PAD]
# Every byte has a token, so that any text can be encoded.
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


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

    # Characters that represent bytes: printable ones themselves, the other bytes, in order, characters from 256 on.
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
    with progress(total=total, desc="train tokenizer", unit="B", unit_scale=True) as bar:
        for batch in read_batches(corpus, [key]):
            good, _, bad = batch.texts([key])
            if bad:
                index, reason = bad[0]
                raise ValueError(f"--input {batch.place(index)}: {reason}")
            for (text,) in good:
                yield text.decode()
            bar.update(batch.done - bar.n)
        bar.set_postfix_str("merging")


def _move_files(source: Path, target: Path) -> None:
    """Move the files of one folder into another; tokenizer.json last, which makes the folder a tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "tokenizer.json"):
        path.replace(target / path.name)
    source.rmdir()
