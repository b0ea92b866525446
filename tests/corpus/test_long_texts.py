"""A long text in windows has the ids of the whole text, whatever the tokenizer does; memory stays constant."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.training.config import TokenizerConfig
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

from yoco_megatron.corpus import encoders, long_texts
from yoco_megatron.corpus.encoders import choose_encoder, with_ends
from yoco_megatron.corpus.tokenizer_training import EOD, PAD
from yoco_megatron.data.tokenizer import build_tokenizer

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
UNSPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# (pre-tokenizer, normalizer, whether texts of words are cut at all)
KINDS = {
    "GPT-2": (BYTES, None, True),
    "Llama 3": (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA), "isolated"), UNSPLIT]), None, True),
    "NFKC": (BYTES, normalizers.NFKC(), True),
    "prefix space": (pre_tokenizers.ByteLevel(add_prefix_space=True), None, True),
    "metaspace": (pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), BYTES]), None, True),
    "strips both ends": (BYTES, normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()]), False),
    "one word": (UNSPLIT, None, False),
}


def hard_text(generator: random.Random) -> str:
    """Runs, some longer than a window: words, digits, spaces, marks to be joined, special tokens, any Unicode."""
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    words = ["the quick foxes 0123456789 \n\t", "".join(map(chr, range(256))), "漢字🙂e\u0301\u0323\u200d ا", every]
    alphabets = [*words, " ", "\n ", "a", "0123456789", [f"{EOD} ", f"x{PAD}", EOD]]
    runs = ("".join(generator.choices(generator.choice(alphabets), k=generator.choice([3, 50, 700, 3000])))
            for _ in range(60))  # fmt: skip
    return "".join(runs)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole(bpe_folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "WINDOW", 2000)
    monkeypatch.setattr(long_texts, "MARGIN", 300)
    core = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    core.post_processor = None
    core.pre_tokenizer, normalizer, cut = KINDS[kind]
    if normalizer is not None:
        core.normalizer = normalizer
    generator = random.Random(kind)
    words = " ".join(generator.choices(["the", "quick", "größer", "foxes", "1234567", "x_7\n"], k=10_000))
    for text in (words, *(hard_text(generator) for _ in range(4))):
        parts = list(long_texts._window_ids(core, text))
        assert [token for part in parts for token in part] == core.encode(text, add_special_tokens=False).ids
        if text is words:
            assert (len(parts) > 3) == cut


def test_what_is_not_local_is_not_cut(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word of a window is another one when it is the first: the end that is encoded again shows it."""
    monkeypatch.setattr(long_texts, "WINDOW", 2000)
    monkeypatch.setattr(long_texts, "MARGIN", 300)
    core = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    core.post_processor = None
    core.normalizer = normalizers.Prepend("x")
    text = "the quick foxes " * 1000
    assert len(list(long_texts._window_ids(core, text))) == 1
    assert long_texts.encode_in_windows(core, text).tolist() == core.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("plain", [False, True])
def test_long_texts_have_their_ends_and_their_place(
    bpe_folder: Path, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between short ones, through the encoder, with a template that adds tokens and a trim of offsets."""
    for module in (long_texts, encoders):
        monkeypatch.setattr(module, "WINDOW", 2000)
    monkeypatch.setattr(long_texts, "MARGIN", 300)
    monkeypatch.setattr(
        encoders, "encode_in_windows", lambda *given: cut.append(1) or long_texts.encode_in_windows(*given)
    )
    cut: list[int] = []
    flags = {"tokenizer_model": str(bpe_folder), "tokenizer_hf_no_include_special_tokens": plain}
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", **flags))
    core = tokenizer._tokenizer.tokenizer.backend_tokenizer
    template = processors.TemplateProcessing(single=f"{PAD} $A {EOD}", special_tokens=[(PAD, 1), (EOD, 0)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    texts = ["short", " the quick foxes " * 1000, "", "größer " * 2000, "last"]
    encoder = choose_encoder(tokenizer, "library")
    found = with_ends(encoder.encode([text.encode() for text in texts]), encoder.prefix, encoder.suffix)
    assert [found.of(index).tolist() for index in range(5)] == [tokenizer.tokenize(text) for text in texts]
    assert (found.of(1)[0] == 1) is not plain and len(cut) == 2


MEMORY = """
import resource, sys
from megatron.training.config import TokenizerConfig
from yoco_megatron.corpus.encoders import choose_encoder
from yoco_megatron.data.tokenizer import build_tokenizer
tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=sys.argv[1]))
encode = choose_encoder(tokenizer, "library").encode
text = b"the quick foxes = 12, return x_7 \\n" * (int(sys.argv[2]) // 34)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(encode([text]).ids) > len(text) // 8
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(text))
"""


def test_memory_of_a_document(bpe_folder: Path) -> None:
    """Bytes for each of its bytes: its text, twice, and its ids; encoded at once, 140."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, bpe_folder, "8000000"], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert float(done.stdout.split()[-1]) < 30
