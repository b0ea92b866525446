"""Sentences are encoded one by one and stay in their document; an index of sentences is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.training.config import TokenizerConfig

from yoco_megatron.corpus.preprocess import preprocess
from yoco_megatron.corpus.sentences import SentenceSplitter
from yoco_megatron.data.check import check_data_prefixes
from yoco_megatron.data.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(bpe_folder: Path) -> Any:
    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(bpe_folder)))


@pytest.fixture
def punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Punkt model that knows one abbreviation, where nltk finds it."""
    from nltk.tokenize import punkt

    folder = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path / "nltk")])
    parameters = punkt.PunktParameters()
    parameters.abbrev_types.add("dr")
    punkt.save_punkt_params(parameters, str(folder))


@pytest.mark.parametrize("keep_newlines", [False, True])
def test_sentences_stay_in_their_document(punkt: None, tokenizer: Any, tmp_path: Path, keep_newlines: bool) -> None:
    texts = ["He left.  She came.\n\nThen Dr. No came. ", "One only", " \n ", "A. B."]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    splitter = SentenceSplitter("english", keep_newlines)
    parts = [splitter.split(text) for text in texts]
    kept = ["He left.  ", "She came.\n\n", "Then Dr. No came. "]
    assert parts[0] == (kept if keep_newlines else [sentence.strip() for sentence in kept])
    assert not keep_newlines or ["".join(sentences) for sentences in parts] == texts
    preprocess([path], str(tmp_path / "out"), tokenizer, keys=["text"], append_eod=True, workers=2, sentences=splitter)
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    wanted = [[token for part in sentences for token in tokenizer.tokenize(part)] for sentences in parts]
    wanted = [[*ids, tokenizer.eod] for ids in wanted if ids]
    assert [dataset[index].tolist() for index in range(len(dataset))] == wanted
    assert len(dataset.document_indices) == len(wanted) + 1


def test_missing_punkt_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"--split-sentences: .* --lang klingon.*NLTK_DATA.*PunktTrainer"):
        SentenceSplitter("klingon", False)


def test_an_index_of_sentences_is_refused(tmp_path: Path) -> None:
    """GPTDataset would take each sentence for a document, and shuffle them."""
    for name, lengths in (("sentences", [2, 1, 1]), ("documents", [4])):
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        builder.add_document([1, 2, 3, 4], lengths)
        builder.add_document([], [])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    with pytest.raises(ValueError, match=r"sentences\.idx is an index of sentences \(3 in 2 documents\)") as error:
        check_data_prefixes([str(tmp_path / "sentences")])
    assert "again" not in str(error.value)
    check_data_prefixes([str(tmp_path / "documents")])
