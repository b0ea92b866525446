"""A run keeps its tokenizer, and whoever reads the run gets that one, is told of another, or is refused."""

import json
import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from yoco_megatron.data import carried_tokenizer
from yoco_megatron.data.carried_tokenizer import absolute_paths, carry, of_run, template_of_data
from yoco_megatron.data.tokenizer import tokenizer_sha256


def tokenizer(folder: Path, word: str = "a") -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {word: 0}}}))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def flags(model: Path | None, **more: Any) -> Namespace:
    others = {"vocab_file": None, "merge_file": None, "trust_remote_code": False}
    return Namespace(tokenizer_model=model and str(model), **others | more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The --save of a run with the tokenizer tmp_path/bpe."""
    folder, model = tmp_path / "run", tokenizer(tmp_path / "bpe")
    carry(flags(model), str(folder))
    (folder / "data.json").write_text(json.dumps({"tokenizer_sha256": tokenizer_sha256(str(model))}))
    written = {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": str(model)}
    (folder / "resolved_config.yaml").write_text(yaml.safe_dump(written))
    return folder


def test_the_tokenizers_files_alone_are_copied(tmp_path: Path) -> None:
    model = tokenizer(tmp_path / "model")
    for name in (
        "model.safetensors",
        "config.json",
        "modeling.py",
        "tokenization.py",
        "vocab.txt",
        "chat_template.jinja",
    ):
        (model / name).write_text(name)
    (model / "tokenizer_files").mkdir()
    wanted = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    carry(flags(model), str(tmp_path / "run"))
    assert names(tmp_path / "run/tokenizer") == wanted and names(tmp_path / "run") == ["tokenizer"]
    code = sorted([*wanted, "modeling.py", "tokenization.py"])
    carry(flags(model, trust_remote_code=True), str(tmp_path / "trusting"))
    assert names(tmp_path / "trusting/tokenizer") == code, "it was trained with this code"


def test_single_files_are_copied_too(tmp_path: Path) -> None:
    for name in ("pieces.model", "v.json", "m.txt"):
        (tmp_path / name).write_text(name)
    carry(flags(tmp_path / "pieces.model"), str(tmp_path / "pieces"))
    assert names(tmp_path / "pieces/tokenizer") == ["pieces.model"]
    carry(flags(None, vocab_file=str(tmp_path / "v.json"), merge_file=str(tmp_path / "m.txt")), str(tmp_path / "gpt2"))
    assert names(tmp_path / "gpt2/tokenizer") == ["m.txt", "v.json"]
    carry(flags(None), str(tmp_path / "null"))
    assert not (tmp_path / "null").exists()


def test_another_tokenizer_is_renamed_and_the_same_is_left(run: Path, tmp_path: Path) -> None:
    before = (run / "tokenizer").stat().st_mtime_ns, (run / "tokenizer").stat().st_ino
    carry(flags(tmp_path / "bpe"), str(run))
    carry(flags(run / "tokenizer"), str(run))
    assert ((run / "tokenizer").stat().st_mtime_ns, (run / "tokenizer").stat().st_ino) == before
    for number, word in enumerate("bc", 1):
        carry(flags(tokenizer(tmp_path / word, word)), str(run))
        assert word in (run / "tokenizer/tokenizer.json").read_text() and (run / f"tokenizer.{number}").is_dir()
    assert '"a"' in (run / "tokenizer.1/tokenizer.json").read_text()


def test_the_copy_is_used_wherever_the_original_is(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert of_run(run) == run / "tokenizer"
    (tmp_path / "bpe").rename(tmp_path / "elsewhere")
    assert of_run(run) == run / "tokenizer"
    moved = run.rename(tmp_path / "moved run")
    assert of_run(moved) == moved / "tokenizer" and not caplog.records


def test_a_replaced_original_is_told_with_both_hashes(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(tmp_path / "bpe")
    hashes = [tokenizer_sha256(str(path))[:12] for path in (run / "tokenizer", tokenizer(tmp_path / "bpe", "other"))]
    assert of_run(run) == run / "tokenizer"
    assert all(digest in caplog.text for digest in hashes) and hashes[0] != hashes[1]


@pytest.mark.parametrize("carried", [True, False])
def test_another_tokenizer_is_refused_unless_it_is_named(
    run: Path, tmp_path: Path, carried: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In the copy, or, as in a run of before there were copies, at the recorded path."""
    if not carried:
        shutil.rmtree(run / "tokenizer")
        assert of_run(run) == tmp_path / "bpe"
    place = run / "tokenizer" if carried else tmp_path / "bpe"
    was = tokenizer_sha256(str(place))[:12]
    shutil.rmtree(place)
    now = tokenizer_sha256(str(tokenizer(place, "other")))[:12]
    with pytest.raises(
        ValueError, match=rf"{place} \(sha256 {now}\) is another .*{was}, see .*data\.json.* --tokenizer"
    ):
        of_run(run)
    with caplog.at_level(logging.WARNING):
        assert of_run(run, given=str(place)) == place
    assert now in caplog.text and was in caplog.text


def test_there_may_be_none(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run / "tokenizer")
    (tmp_path / "bpe").rename(tmp_path / "elsewhere")
    assert of_run(run) is None and f"{tmp_path / 'bpe'}, the tokenizer of the run, is not there" in caplog.text
    assert of_run(run, given=str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=r"--tokenizer nowhere: no such folder"):
        of_run(run, given="nowhere")
    (run / "resolved_config.yaml").write_text("tokenizer-type: NullTokenizer")
    tokenizer(run / "tokenizer")
    assert of_run(run) is None, "what is there is not the run's"


@pytest.mark.parametrize("content", ["[", "[]", '{"tokenizer_sha256": 3}', '{"document_start": "<s>"}'])
def test_a_damaged_record_is_one_error(run: Path, content: str) -> None:
    (run / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json"):
        carried_tokenizer.recorded(run)


def test_recorded_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer(tmp_path / "bpe")
    given = {"tokenizer-model": "bpe", "merge-file": "nowhere", "save": "bpe", "vocab-file": None}
    assert absolute_paths(given) == given | {"tokenizer-model": str(tmp_path / "bpe")}
    assert absolute_paths({"tokenizer-model": "gpt2"}) == {"tokenizer-model": "gpt2"}


def test_a_chat_template_of_the_data_goes_with_it(tmp_path: Path) -> None:
    model = tokenizer(tmp_path / "bpe")
    (model / "chat_template.jinja").write_text("the tokenizer's")
    carry(flags(model), str(tmp_path / "plain"))
    carry(flags(model), str(tmp_path / "chat"), "{{ messages }}")
    found = [(tmp_path / name / "tokenizer/chat_template.jinja").read_text() for name in ("plain", "chat")]
    assert found == ["the tokenizer's", "{{ messages }}"]


def test_the_template_that_all_data_have(tmp_path: Path) -> None:
    for name, options in {"a": {"chat_template": "A"}, "b": {"chat_template": "B"}, "text": {}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokenizer": {"options": options}}))
    of = lambda *names: template_of_data(  # noqa: E731
        Namespace(
            data_path=[str(tmp_path / name) for name in names],
            **dict.fromkeys(
                ("train_data_path", "valid_data_path", "test_data_path", "data_args_path", "per_split_data_args_path")
            ),
        )
    )
    assert (of("a", "text"), of("text"), of("a", "b")) == ("A", None, None)
