"""A tokenizer that several files of tests use."""

import json
from pathlib import Path

import pytest

from yoco_megatron.data.tokenizer import train_tokenizer


@pytest.fixture(scope="package")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens; not to be changed."""
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [json.dumps({"text": f"the {n} quick größer foxes = {n * n}, return x_{n % 7}"}) for n in range(400)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    train_tokenizer([folder / "corpus.jsonl"], 400, folder / "bpe")
    return folder / "bpe"
