"""Real text for small models: the source and documentation of the installed packages, tokenized with our own tools."""

import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from runs import ROOT

SOURCES = [
    *("*.py", "*.pyi", "*.pyx", "*.pxd", "*.md", "*.rst", "*.txt", "*.cmake"),
    *("*.h", "*.hpp", "*.cuh", "*.cu", "*.c", "*.cc", "*.cpp"),
]
TOKENIZER_BYTES = 100_000_000  # of the shuffled corpus, from which the vocabulary is learnt
DATA = "data_text_document"


def prepare(folder: Path, text: Path | None, words: int) -> None:
    """corpus.jsonl, tokenizer and data_text_document.bin/.idx in `folder`; what is there already is kept."""
    corpus_and_tokenizer(folder, text, words)
    if not (folder / f"{DATA}.json").exists():
        tokenize(folder / "corpus.jsonl", folder / "tokenizer", folder / "data")


def corpus_and_tokenizer(folder: Path, text: Path | None, words: int) -> None:
    """corpus.jsonl and tokenizer in `folder`; what is there already is kept.

    Args:
        text: a folder of text files; None: the site-packages of this Python.
        words: size of the vocabulary.
    """
    corpus, sample, tokenizer = folder / "corpus.jsonl", folder / "sample.jsonl", folder / "tokenizer"
    gather(corpus, text or Path(sysconfig.get_paths()["purelib"]))
    if not (tokenizer / "tokenizer.json").exists():
        with corpus.open("rb") as source, sample.open("wb") as target:
            target.writelines(source.readlines(TOKENIZER_BYTES))
        _tool("train_tokenizer", "--input", sample, "--vocab-size", words, "--output", tokenizer)


def gather(corpus: Path, text: Path) -> None:
    """Write the texts below a folder to `corpus`, without copies, unless it exists."""
    if corpus.exists():
        return
    corpus.parent.mkdir(parents=True, exist_ok=True)
    raw = corpus.with_name(f"{corpus.stem}_gathered.jsonl")
    _tool("gather_text", "--input", text, "--glob", *SOURCES, "--output", raw)
    print(without_copies(raw, corpus), flush=True)
    raw.unlink()


def tokenize(corpus: Path, tokenizer: Path, prefix: Path) -> None:
    """Write PREFIX_text_document.bin/.idx; what looks like a special token is text."""
    kind = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer)
    _tool(
        "preprocess_data", "--input", corpus, *kind, "--append-eod", "--split-special-tokens", "--output-prefix", prefix
    )


def without_copies(source: Path, target: Path) -> str:
    """Copy the lines of a corpus whose text has not occurred before; says how many had.

    A vendored file in both the training and the validation part would measure memory.
    """
    seen: set[bytes] = set()
    copies = 0
    aside = target.with_suffix(".tmp")
    with source.open("rb") as lines, aside.open("wb") as kept:
        for line in lines:
            digest = hashlib.sha256("".join(json.loads(line)["text"].split()).encode()).digest()
            if digest in seen:
                copies += 1
            else:
                seen.add(digest)
                kept.write(line)
    aside.replace(target)
    return f"{target}: {len(seen):,} documents; {copies:,} copies (but for white space) left out"


def flags(folder: Path, split: str = "98,2,0") -> list[str]:
    """Of pretrain_yoco.py, for the data in `folder`."""
    return [
        *("--data-path", str(folder / DATA), "--split", split),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer")),
    ]


def _tool(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, f"tools/{name}.py", *map(str, arguments)], cwd=ROOT, check=True)
