"""Batched ids are those that Megatron's tokenizer gives text by text, for every backend."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.training.config import TokenizerConfig
from tokenizers import Tokenizer, normalizers, processors
from transformers import ByT5Tokenizer

from yoco_megatron.corpus import encoders
from yoco_megatron.corpus.encoders import (
    HARD_TEXTS,
    Ids,
    choose_encoder,
    compared,
    find_special,
    join,
    with_ends,
)
from yoco_megatron.corpus.tokenizer_training import EOD, PAD
from yoco_megatron.data.tokenizer import build_tokenizer, special_tokens

TEXTS = [*HARD_TEXTS, f"one{EOD}two", f"{PAD}{PAD}", "def f(x):\n\treturn x"]


def built(model: Path | None, kind: str = "HuggingFaceTokenizer", **more: Any) -> Any:
    return build_tokenizer(
        TokenizerConfig(tokenizer_type=kind, tokenizer_model=None if model is None else str(model), **more)
    )


def random_texts(count: int) -> list[str]:
    """Texts of letters, spaces, digits, controls and whole Unicode, without surrogates, of very different lengths."""
    generator = random.Random(11)
    alphabets = ["the quick größer foxes 0123456789 \n\t", "".join(map(chr, range(256))), "漢字🙂é\u0301\u200d ا"]
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    return [
        "".join(generator.choices(generator.choice([*alphabets, every]), k=generator.choice([0, 3, 50, 700])))
        for _ in range(count)
    ]


def encoded(encode: encoders.Encoder, texts: list[str]) -> list[list[int]]:
    found = encode([text.encode() for text in texts])
    assert found.lengths.sum() == len(found.ids)
    return [found.of(index).tolist() for index in range(len(texts))]


@pytest.mark.parametrize("backend", ["gigatoken", "library"])
def test_ids_are_those_of_single_texts(bpe_folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
        monkeypatch.setattr(encoders, "compared", lambda fast, exact: fast)  # its ids, and nobody who checks them
    tokenizer, texts = built(bpe_folder), TEXTS + random_texts(300)
    encoder = choose_encoder(tokenizer, backend)
    assert encoder.backend == {"library": "tokenizers"}.get(backend, backend)
    assert encoded(encoder.encode, texts) == [tokenizer.tokenize(text) for text in texts]
    assert encoded(encoder.encode, []) == []


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("backend", ["auto", "library"])
def test_what_a_tokenizer_json_may_carry(bpe_folder: Path, tmp_path: Path, plain: bool, backend: str) -> None:
    """Beginning of text, truncation, padding; and after a use that set both."""
    stored = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    stored.post_processor = processors.TemplateProcessing(
        single=f"{PAD} $A {EOD} {EOD}", special_tokens=[(PAD, 1), (EOD, 0)]
    )
    stored.enable_truncation(4)
    stored.enable_padding(length=50)
    for path in bpe_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored.save(str(tmp_path / "tokenizer.json"))
    expected, used = (built(tmp_path, tokenizer_hf_no_include_special_tokens=plain) for _ in range(2))
    used._tokenizer.tokenizer("used", truncation=True, max_length=4, padding="max_length")
    encoder = choose_encoder(used, backend)
    ids = [[*encoder.prefix, *ids, *encoder.suffix] for ids in encoded(encoder.encode, TEXTS)]
    assert ids == [expected.tokenize(text) for text in TEXTS]
    assert (ids[0][0] == 1) is not plain


@pytest.mark.parametrize("backend", ["gigatoken", "library"])
def test_special_tokens_are_found_or_split(bpe_folder: Path, backend: str) -> None:
    """By default text that spells one becomes it, and is found; split, it is text, and no other text changes."""
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    tokenizer = built(bpe_folder)
    special = special_tokens(tokenizer)
    assert special == {0: EOD, 1: PAD}
    texts = ["none", "", f"a {EOD} b{PAD}{EOD}", EOD, *HARD_TEXTS]
    coded = [text.encode() for text in texts]
    found = choose_encoder(tokenizer, backend).encode(coded)
    assert find_special(found, special) == {2: [f"'{EOD}' (0)", f"'{PAD}' (1)"], 3: [f"'{EOD}' (0)"]}
    split = choose_encoder(tokenizer, backend, split_special_tokens=True).encode(coded)
    assert find_special(split, special) == {}
    ids = [split.of(index).tolist() for index in range(len(texts))]
    assert [tokenizer.detokenize(row) for row in ids] == texts
    assert [ids[index] for index in (0, 1, *range(4, len(texts)))] == [
        found.of(index).tolist() for index in (0, 1, *range(4, len(texts)))
    ]


def test_auto_takes_the_library_where_gigatoken_differs(bpe_folder: Path, tmp_path: Path) -> None:
    """A normalizer decides ids; whatever gigatoken makes of it, auto gives the tokenizer's own."""
    stored = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    stored.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    for path in bpe_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = built(tmp_path)
    assert encoded(choose_encoder(tokenizer).encode, TEXTS) == [tokenizer.tokenize(text) for text in TEXTS]


def test_other_libraries(tmp_path: Path) -> None:
    null = built(None, "NullTokenizer", vocab_size=100)
    assert encoded(choose_encoder(null).encode, ["1 2 3", "7"]) == [[1, 2, 3], [7]]
    with pytest.raises(ValueError, match=r"--tokenizer-backend gigatoken: .*not a Hugging Face tokenizer"):
        choose_encoder(null, "gigatoken")
    assert find_special(join([[1, 99], [5]]), special_tokens(null)) == {0: ["'the end of document' (99)"]}
    with pytest.raises(ValueError, match=r"--split-special-tokens: NullTokenizer reads ids"):
        choose_encoder(null, split_special_tokens=True)


def test_a_tokenizer_in_python(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = built(tmp_path)
    texts = ["größer", "", "a</s>b"]
    encoder = choose_encoder(tokenizer)
    ids = encoded(encoder.encode, texts)
    assert [[*row, 1] for row in ids] == [tokenizer.tokenize(text) for text in texts]
    assert (encoder.prefix, encoder.suffix) == ([], [1]) and 1 in ids[2]
    split = encoded(choose_encoder(tokenizer, split_special_tokens=True).encode, texts)
    assert split == [[byte + 3 for byte in text.encode()] for text in texts]


def test_sentencepiece(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = [f"the {n} quick foxes are {n * n} lazy dogs" for n in range(300)]
    with (tmp_path / "pieces.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=stream, vocab_size=90, byte_fallback=False, minloglevel=2
        )
    tokenizer = built(tmp_path / "pieces.model", "GPTSentencePieceTokenizer")
    texts = [*TEXTS, *sentences[:20], "</s> <s>"]
    ids = [list(tokenizer.tokenize(text)) for text in texts]
    assert special_tokens(tokenizer) == {1: "<s>", 2: "</s>"}
    for split in (False, True):
        found = choose_encoder(tokenizer, split_special_tokens=split).encode([text.encode() for text in texts])
        assert [found.of(index).tolist() for index in range(len(texts))] == ids
        assert not find_special(found, special_tokens(tokenizer)), "it never takes text for a control symbol"


def test_sentencepiece_of_old(tmp_path: Path) -> None:
    """Megatron's legacy wrapper looks for special tokens itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    with (tmp_path / "pieces.model").open("wb") as stream:
        sentences = (f"the {n} quick foxes are {n * n} lazy dogs" for n in range(300))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=stream, vocab_size=60, byte_fallback=False, minloglevel=2
        )
    legacy = {"tokenizer_sentencepiece_legacy": True, "special_tokens": ["<foxes>"]}
    tokenizer = built(tmp_path / "pieces.model", "GPTSentencePieceTokenizer", **legacy)
    text = "the <foxes> dogs"
    assert encoded(choose_encoder(tokenizer).encode, [text]) == [list(tokenizer.tokenize(text))]
    assert 60 in tokenizer.tokenize(text) and special_tokens(tokenizer)[60] == "<foxes>"
    assert 60 not in encoded(choose_encoder(tokenizer, split_special_tokens=True).encode, [text])[0]


def test_tiktoken(tmp_path: Path) -> None:
    """A vocabulary file as Megatron's TikTokenizer reads it: the bytes, and words that are in the texts."""
    pytest.importorskip("tiktoken")
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" f", b" fo", b" fox", b"\n\t", b"ab", b"  "]
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
        for rank, token in enumerate(tokens)
    ]
    (tmp_path / "vocab.json").write_text(json.dumps(rows))
    more = {"tiktoken_pattern": "v2", "vocab_size": len(rows) + 20, "tiktoken_num_special_tokens": 20}
    tokenizer = built(tmp_path / "vocab.json", "TikTokenizer", **more)
    encoder = choose_encoder(tokenizer)
    texts = [*TEXTS, "the fox", "</s>one<s>two<SPECIAL_9>", *random_texts(100)]
    expected = [tokenizer.tokenize(text) for text in texts]
    assert encoder.backend == "tiktoken" and encoded(encoder.encode, texts) == expected
    assert expected[len(TEXTS)] == [20 + 257, 20 + 260]
    special = special_tokens(tokenizer)
    marked = find_special(encoder.encode([text.encode() for text in texts]), special)[len(TEXTS) + 1]
    assert marked == ["'</s>' (2)", "'<s>' (1)", "'<SPECIAL_9>' (9)"]
    split = choose_encoder(tokenizer, split_special_tokens=True).encode([text.encode() for text in texts])
    assert not find_special(split, special)
    assert [tokenizer.detokenize(split.of(index).tolist()) for index in range(len(texts))] == texts


def of_bytes(texts: list[bytes]) -> Ids:
    return join([list(text) for text in texts])


def test_a_different_id_is_an_error() -> None:
    def wrong(texts: list[bytes]) -> Ids:
        return join([[0] if b"bad" in text else list(text) for text in texts])

    encode = compared(wrong, of_bytes)
    assert encoded(encode, ["a", ""]) == [[97], []]
    with pytest.raises(ValueError, match=r"--tokenizer-backend: .*'bad text'.*library"):
        encode([b"good", b"bad text"])


def test_later_calls_are_probed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "FIRST_BYTES", 4)
    seen: list[int] = []

    def exact(texts: list[bytes]) -> Ids:
        seen.append(len(texts))
        return of_bytes(texts)

    encode = compared(of_bytes, exact)
    for _ in range(3):
        encode([b"abc", b"def"])
    encode([])
    encode([b"x" * 5000])
    assert seen == [2, 1, 1, 0, 0]


def test_ends_are_added_to_every_text() -> None:
    rows = [[5, 6], [], [7], []]
    found = with_ends(join(rows), [1, 2], [3, 4])
    assert [found.of(index).tolist() for index in range(4)] == [[1, 2, *row, 3, 4] for row in rows]
    assert with_ends(join(rows), [], []).ids.tolist() == [5, 6, 7]
    one = with_ends(join([np.array([5, 6]), np.array([7])]), [], [0])
    assert one.ids.tolist() == [5, 6, 0, 7, 0] and one.lengths.tolist() == [3, 2]
