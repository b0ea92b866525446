"""Documents to measure losses on: a Megatron dataset, the lines of a .jsonl file, a file of text, a folder of .txt."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from yoco_megatron.corpus.gather import parse_line
from yoco_megatron.data.check import read_report
from yoco_megatron.data.idx import check_index
from yoco_megatron.evaluation.requests import Tokenizer
from yoco_megatron.utils.errors import require
from yoco_megatron.utils.small_files import read_text

logger = logging.getLogger(__name__)

LARGEST = 4 << 30  # bytes of a file of text


@dataclass(frozen=True)
class Document:
    """tokens: int64 [T], with the document's beginning, without its end. text: None where only tokens are stored."""

    tokens: np.ndarray
    text: str | None

    def predicted_bytes(self, tokenizer: Tokenizer) -> int:
        """UTF-8 bytes of the text that the tokens from the second on are of."""
        start = len(tokenizer.start)
        text = tokenizer.decode(self.tokens[start:].tolist()) if self.text is None else self.text
        first = "" if start else tokenizer.decode(self.tokens[:1].tolist())  # which nothing predicts
        return len(text.encode()) - len(first.encode())


def check_data(data: str) -> None:
    """Raises ValueError for data that are not there, or not of a kind that is read."""
    path = Path(data)
    if _is_dataset(data):
        check_index(Path(f"{data}.idx"), Path(f"{data}.bin"))
    elif path.is_dir():
        require(any(path.glob("*.txt")), f"'data' {data} has no .txt file: name another folder")
    else:
        require(
            path.is_file() and path.suffix not in (".bin", ".idx"),
            f"'data' {data} is no file of text or .jsonl, no folder of .txt files, and no prefix of a .bin and .idx",
        )


def _is_dataset(data: str) -> bool:
    return Path(f"{data}.idx").is_file() and Path(f"{data}.bin").is_file()


@lru_cache(maxsize=2)
def read_documents(data: str, tokenizer: Tokenizer, limit: int | None, key: str) -> tuple[Document, ...]:
    """The first `limit` documents, or all. Raises ValueError as `iter_documents`, and if there is none."""
    documents = tuple(itertools.islice(iter_documents(data, tokenizer, key), limit))
    require(bool(documents), f"'data' {data} holds no document with a token to predict")
    return documents


def iter_documents(data: str, tokenizer: Tokenizer, key: str) -> Iterator[Document]:
    """The documents that have a token to predict.

    Args:
        data: prefix of a Megatron dataset, a .jsonl file, a file of text, or a folder of .txt files.
        key: of the text in JSON lines.
    Raises:
        ValueError: a file or line that cannot be read.
    """
    start = np.asarray(tokenizer.start, np.int64)
    if _is_dataset(data):
        found: Iterator[tuple[np.ndarray, str | None]] = ((tokens, None) for tokens in _stored(data, tokenizer))
    else:
        found = ((np.asarray(tokenizer.encode(text), np.int64), text) for text in _texts(Path(data), key))
    for tokens, text in found:
        if len(start) + len(tokens) >= 2:
            yield Document(np.concatenate([start, tokens]), text)


def _stored(data: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The documents of a Megatron dataset, without what begins and ends them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs = (read_report(data).get("tokenizer") or {}).get("sha256")
    if (
        None not in (theirs, tokenizer.sha256) and theirs != tokenizer.sha256
    ):  # an exported one may begin texts otherwise
        logger.warning("'data' %s was made with another tokenizer than the model has (see %s.json)", data, data)
    dataset = IndexedDataset(data)
    for number in range(len(dataset)):
        tokens = dataset.get(number).astype(np.int64)
        low, high = tokens.min(initial=0), tokens.max(initial=0)
        require(
            0 <= low <= high < tokenizer.rows,
            f"'data' {data}, document {number}: ids from {low} to {high} are not the tokenizer's, which end at "
            f"{tokenizer.rows - 1}",
        )
        if tuple(tokens[: len(tokenizer.start)].tolist()) == tokenizer.start:
            tokens = tokens[len(tokenizer.start) :]
        while len(tokens) and tokens[-1] == tokenizer.end:
            tokens = tokens[:-1]
        yield tokens


def _texts(path: Path, key: str) -> Iterator[str]:
    if path.suffix != ".jsonl":
        yield from (read_text(file, LARGEST) for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path]))
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield parse_line(line, [key], f"{path}:{number}")[0].decode()
