"""The trained tokenizer, as Hugging Face and as Megatron load it, and batched encoding against text by text."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from megatron.core.tokenizers.text.libraries import ByteLevelTokenizer
from megatron.training.config import TokenizerConfig
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from yoco_megatron.corpus.encoders import choose_encoder
from yoco_megatron.corpus.tokenizer_training import EOD, MIN_VOCAB_SIZE, PAD, byte_tokenizer, train_tokenizer
from yoco_megatron.data.tokenizer import (
    HUB_SECONDS,
    build_tokenizer,
    check_flags,
    check_vocabulary,
    describe,
    tokenizer_sha256,
    use_files_of_gpt2,
)

# Not in the training text: other scripts, control characters, spaces at both ends, the special token itself.
TEXTS = ["def f(x):\n\treturn x", "  two  spaces ", "größer 漢字 🙂", "\x00\x7f\r\n", f"one{EOD}two", "", "naïve"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    sentences = [f"the {n} quick foxes = {n * n} lazy dogs, return x_{n % 7}" for n in range(400)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    return path


@pytest.fixture(scope="module")
def folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / "bpe"
    assert train_tokenizer([corpus], 300, output) == 300
    return output


def config(model: Path | str | None, kind: str = "HuggingFaceTokenizer", **more: object) -> TokenizerConfig:
    return TokenizerConfig(tokenizer_type=kind, tokenizer_model=None if model is None else str(model), **more)


def test_hugging_face_loads_it_and_any_text_survives(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOD, PAD)
    assert len(tokenizer) == 300
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_megatron_builds_it_with_its_end_of_document(folder: Path) -> None:
    tokenizer = build_tokenizer(config(folder))
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.eod == stored.token_to_id(EOD) == 0
    assert tokenizer.pad == stored.token_to_id(PAD) != tokenizer.eod
    assert tokenizer.vocab_size == 300
    for text in TEXTS:
        assert tokenizer.tokenize(text) == stored.encode(text).ids
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_bytes_are_ids(tmp_path: Path) -> None:
    """Those of megatron.core's class of that name; no byte is an end of document."""
    assert byte_tokenizer(tmp_path / "bytes") == 258
    tokenizer = build_tokenizer(config(tmp_path / "bytes"))
    assert (tokenizer.eod, tokenizer.pad, tokenizer.vocab_size) == (256, 257, 258)
    every = "".join(map(chr, range(0x110000 - 0x800)[::7])).encode(errors="ignore").decode()
    for text in (every, "".join(map(chr, range(256))), *TEXTS):
        if EOD not in text:
            assert tokenizer.tokenize(text) == ByteLevelTokenizer().text_to_ids(text) == list(text.encode())
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    for backend in ("auto", "library"):
        found = choose_encoder(tokenizer, backend).encode([text.encode() for text in TEXTS])
        assert [found.of(index).tolist() for index in range(len(TEXTS))] == [tokenizer.tokenize(text) for text in TEXTS]


def test_same_corpus_gives_the_same_bytes_in_another_process(corpus: Path, folder: Path, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from yoco_megatron.corpus import tokenizer_training as t\n"
    code += "t.train_tokenizer([Path(sys.argv[1])], 300, Path(sys.argv[2]))"
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", code, corpus, again], check=True, env={"PYTHONPATH": ":".join(sys.path)})
    names = sorted(path.name for path in folder.iterdir())
    assert "tokenizer.json" in names
    assert names == sorted(path.name for path in again.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert tokenizer_sha256(str(folder)) == tokenizer_sha256(str(again / "tokenizer.json"))
    assert tokenizer_sha256("no/such/folder") is None


def test_a_tokenizer_saved_again_is_the_same(folder: Path, tmp_path: Path) -> None:
    """By tokenizers on one line, by transformers after a use that padded and truncated, with merges as of old."""
    ours = tokenizer_sha256(str(folder))
    assert ours == tokenizer_sha256(str(folder / "tokenizer.json"))
    file = tmp_path / "tokenizer.json"
    Tokenizer.from_file(str(folder / "tokenizer.json")).save(str(file), pretty=False)
    assert file.read_bytes() != (folder / "tokenizer.json").read_bytes()
    assert tokenizer_sha256(str(tmp_path)) == ours
    used = AutoTokenizer.from_pretrained(folder)
    used("some text", truncation=True, max_length=2, padding="max_length")
    used.save_pretrained(tmp_path)
    content = json.loads(file.read_text())
    assert content["truncation"] and content["padding"]
    assert tokenizer_sha256(str(tmp_path)) == ours
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    file.write_text(json.dumps(content))
    assert tokenizer_sha256(str(tmp_path)) == ours

    content["model"]["merges"][-1:] = []
    file.write_text(json.dumps(content))
    assert tokenizer_sha256(str(tmp_path)) != ours


def test_a_folder_without_a_tokenizer_json_has_one_too(tmp_path: Path) -> None:
    assert tokenizer_sha256(str(tmp_path)) is None
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b")
    before = tokenizer_sha256(str(tmp_path))
    assert before is not None
    (tmp_path / "merges.txt").write_text("a c")
    assert tokenizer_sha256(str(tmp_path)) not in (before, None)


def test_training_again_replaces_and_leaves_nothing_aside(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "bpe"
    train_tokenizer([corpus], 300, output)
    assert train_tokenizer([corpus], 280, output) == 280
    assert len(AutoTokenizer.from_pretrained(output)) == 280
    assert [path.name for path in tmp_path.iterdir()] == ["bpe"]


def test_vocabulary_must_hold_the_bytes_and_may_end_early(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--vocab-size 257 .*{MIN_VOCAB_SIZE}"):
        train_tokenizer([corpus], 257, tmp_path / "small")
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "ab ab ab"}\n')
    assert MIN_VOCAB_SIZE < train_tokenizer([short], 5000, tmp_path / "few") < 270


def test_bad_corpus_line_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"--input .*bad\.jsonl:3: not a line of JSON"):
        train_tokenizer([bad], 300, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unusable_flags_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tokenizer-type is missing"):
        build_tokenizer(config(tmp_path, kind=None))
    with pytest.raises(ValueError, match=r"--tokenizer-model .*/none does not exist"):
        build_tokenizer(config(tmp_path / "none"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--tokenizer-model .* cannot be loaded"):
        build_tokenizer(config(tmp_path))
    for flag, field in (("--vocab-file", "vocab_file"), ("--tokenizer-metadata", "metadata_path")):
        with pytest.raises(ValueError, match=rf"{flag} nowhere does not exist"):
            build_tokenizer(config(tmp_path, **{field: "nowhere"}))


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("HuggingFaceTokenizer", "a/b/c"),
        ("HuggingFaceTokenizer", "./bpe"),
        ("HuggingFaceTokenizer", "tests/bpe"),  # its folder is here
        ("GPTSentencePieceTokenizer", "pieces.model"),
        ("TikTokenizer", "vocab.json"),
    ],
)
def test_a_path_is_never_looked_up_on_the_hub(kind: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(ValueError, match=rf"--tokenizer-model {model} does not exist") as error:
        build_tokenizer(config(model, kind))
    assert "hub" not in str(error.value).lower()


@pytest.mark.parametrize(("kind", "model"), [("HuggingFaceTokenizer", "nobody/bpe"), ("GPT2BPETokenizer", None)])
def test_a_name_that_the_hub_does_not_give_is_one_question(
    kind: str, model: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a short patience; the library itself tries for a minute."""
    asked = []

    def unreachable(self: HfApi, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    with pytest.raises(ValueError, match=rf"{model or kind}: .*{model or 'gpt2'}.*service not known.*Give a folder"):
        build_tokenizer(config(model, kind))
    assert asked == [(model or "gpt2", HUB_SECONDS)]


def test_vocab_and_merges_load_as_the_error_says(tmp_path: Path) -> None:
    vocabulary = {chr(33 + byte): byte for byte in range(90)} | {"ab": 90, EOD: 91}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = build_tokenizer(config(tmp_path))
    assert tokenizer.tokenize("abc") == [90, vocabulary["c"]] and tokenizer.eod == 91


def test_gpt2_of_files_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = {chr(33 + byte): byte for byte in range(90)} | {"ab": 90, EOD: 91}
    files = {"vocab_file": str(tmp_path / "gpt2-vocab.json"), "merge_file": str(tmp_path / "gpt2-merges.txt")}
    Path(files["vocab_file"]).write_text(json.dumps(vocabulary))
    Path(files["merge_file"]).write_text("#version: 0.2\na b\n")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = config(None, "GPT2BPETokenizer", **files)
    given.resolved_config = {"tokenizer-type": "GPT2BPETokenizer", "vocab-file": "x", "merge-file": "y", "lr": 1}
    use_files_of_gpt2(given)
    tokenizer = build_tokenizer(given)
    assert tokenizer.tokenize("abc") == [90, vocabulary["c"]] and tokenizer.eod == 91
    model = given.tokenizer_model
    assert given.resolved_config == {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": model, "lr": 1}
    assert tokenizer_sha256(model) is not None
    use_files_of_gpt2(given)
    assert given.tokenizer_model == model
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        use_files_of_gpt2(config(None, "GPT2BPETokenizer", **files))
    Path(files["vocab_file"]).unlink()
    with pytest.raises(ValueError, match=r"--vocab-file, --merge-file: .*gpt2-vocab.json is missing"):
        use_files_of_gpt2(config(None, "GPT2BPETokenizer", **files))


def test_a_name_in_the_hubs_cache_is_its_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    here = tmp_path / "models--some--bpe"
    shutil.copytree(folder, here / "snapshots/abc")
    (here / "refs").mkdir()
    (here / "refs/main").write_text("abc")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("asked"))
    check_flags(config("some/bpe"))
    assert tokenizer_sha256("some/bpe") == tokenizer_sha256(str(folder)) is not None


def test_the_vocabulary_has_rows_for_all_ids(folder: Path) -> None:
    tokenizer = build_tokenizer(config(folder))
    check_vocabulary(tokenizer, config(folder, padded_vocab_size=300))
    check_vocabulary(tokenizer, config(folder, padded_vocab_size=300, vocab_size=300))
    with pytest.raises(ValueError, match=r"has the id 299, the embedding 256 rows"):
        check_vocabulary(tokenizer, config(folder, padded_vocab_size=256))
    for size in (200, 400):
        with pytest.raises(ValueError, match=rf"--vocab-size {size}: the tokenizer has 300 ids"):
            check_vocabulary(tokenizer, config(folder, padded_vocab_size=512, vocab_size=size))
    null = config(None, "NullTokenizer", vocab_size=100, padded_vocab_size=128, null_tokenizer_eod_id=500)
    with pytest.raises(ValueError, match=r"has the id 500, the embedding 128 rows"):
        check_vocabulary(build_tokenizer(null), null)


def test_a_report_describes_the_flags(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    more = {"trust_remote_code": True, "tokenizer_hf_no_include_special_tokens": True}
    assert describe(config(folder.name, **more)) == {
        "type": "HuggingFaceTokenizer",
        "model": str(folder),
        "sha256": tokenizer_sha256(str(folder)),
        "options": {"tokenizer_hf_no_include_special_tokens": True},
    }
