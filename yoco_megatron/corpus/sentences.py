"""Encodes each sentence (split by nltk's Punkt) by itself; documents stay whole.

Megatron's own `--split-sentences` writes an index of sentences. GPTDataset treats each of them as a document and
shuffles sentences of all documents; here the sentences of a document stay one sequence.
"""

import itertools
from typing import Any

import numpy as np

from yoco_megatron.corpus.encoders import Encoder, Ids

MISSING = (
    "--split-sentences: nltk finds no Punkt model for --lang {lang}. It looks for tokenizers/punkt_tab/{lang} in the "
    "folders of NLTK_DATA. Get it with: python -m nltk.downloader punkt_tab; or train one on your text: "
    "nltk.tokenize.punkt.PunktTrainer, then save_punkt_params into such a folder"
)


class SentenceSplitter:
    """Punkt of one language, from the models that nltk finds offline.

    Args:
        keep_newlines: a sentence includes the white space up to the next one; False drops it, as Megatron does.
    Raises:
        ValueError: nltk or its model of the language is missing.
    """

    def __init__(self, language: str, keep_newlines: bool) -> None:
        try:
            from nltk.tokenize import PunktTokenizer
        except ImportError:
            raise ValueError("--split-sentences needs nltk: pip install nltk") from None
        self.language, self.keep_newlines = language, keep_newlines
        try:
            self.punkt: Any = PunktTokenizer(language)
        except LookupError:
            raise ValueError(MISSING.format(lang=language)) from None

    def split(self, text: str) -> list[str]:
        """The sentences of a text, none of them empty."""
        spans = list(self.punkt.span_tokenize(text))
        if not self.keep_newlines:
            return [text[start:end] for start, end in spans]
        starts = [0, *[start for start, _ in spans[1:]], len(text)]
        return [text[start:end] for start, end in itertools.pairwise(starts) if end > start]

    def encoder(self, encode: Encoder) -> Encoder:
        """`encode`, applied to each sentence of a text; the ids of a text are those of its sentences in a row."""

        def of_sentences(texts: list[bytes]) -> Ids:
            sentences = [[part.encode() for part in self.split(text.decode())] for text in texts]
            found = encode([sentence for parts in sentences for sentence in parts])
            ends = np.concatenate([[0], np.cumsum(found.lengths)])
            counts = np.cumsum([0, *map(len, sentences)])
            return Ids(found.ids, np.diff(ends[counts]))

        return of_sentences
