"""A tokenizer begins texts as training did, in memory and in the exported folder, and its code does not run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from yoco_megatron.convert import tokenizer_files
from yoco_megatron.corpus.tokenizer_training import EOD, PAD
from yoco_megatron.data.tokenizer import template_ids

# Templates, and what they put around a text; PAD stands for a beginning token.
TEMPLATES = {None: ([], []), f"{PAD} $A": ([1], []), f"$A {EOD}": ([], [0]), f"{PAD} $A {EOD}": ([1], [0])}
TEXT = f"the quick größer {EOD} foxes"


def folder_with(single: str | None, bpe_folder: Path, folder: Path, **config: Any) -> Path:
    shutil.copytree(bpe_folder, folder)
    if single is not None:
        stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
        stored.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(EOD, 0), (PAD, 1)])
        stored.save(str(folder / "tokenizer.json"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


@pytest.mark.parametrize("start", [None, [], [1], [0, 1]])
@pytest.mark.parametrize("single", TEMPLATES)
def test_texts_begin_as_they_should(single: str | None, start: Any, bpe_folder: Path, tmp_path: Path) -> None:
    folder = folder_with(single, bpe_folder, tmp_path / "bpe", bos_token=PAD, add_bos_token=single == f"{PAD} $A")
    before, after = TEMPLATES[single]
    loaded = tokenizer_files.load(folder, start)
    bare = AutoTokenizer.from_pretrained(bpe_folder)(TEXT)["input_ids"]
    wanted = before if start is None else start
    assert template_ids(loaded) == (wanted, after)
    assert tokenizer_files.ids(loaded, TEXT) == [*wanted, *bare], "without the end, which would end the prompt"

    copy = tokenizer_files.copy(folder, tmp_path / "copy", start)
    assert template_ids(copy) == (wanted, after)
    exported = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert exported(TEXT)["input_ids"] == [*wanted, *bare, *after] and exported.eos_token == EOD
    if wanted == before:
        same = [(path / "tokenizer.json").read_bytes() for path in (folder, tmp_path / "copy")]
        assert same[0] == same[1], "nothing to change"


def test_a_start_that_the_tokenizer_lacks(bpe_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"\[99999\] \(data\.json\), which the tokenizer does not have"):
        tokenizer_files.load(bpe_folder, [99999])


def test_a_tokenizer_in_python_keeps_its_ends(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    loaded = tokenizer_files.load(tmp_path, [])
    assert template_ids(loaded) == ([], [1]) and tokenizer_files.ids(loaded, "ab") == [100, 101]
    with pytest.raises(ValueError, match=r"\[0\] \(data\.json\), and ByT5Tokenizer always"):
        tokenizer_files.load(tmp_path, [0])


def test_a_generated_word_keeps_its_space() -> None:
    """SentencePiece's decoders drop the space of the first word, which is not the first of the text."""
    core = Tokenizer(models.WordLevel({"▁the": 0, "▁fox": 1, "es": 2, "▁▁": 3}, unk_token="▁▁"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert tokenizer.decode([1]) == "fox"
    assert tokenizer_files.text_after(tokenizer, [0], [1]) == " fox"
    assert tokenizer_files.text_after(tokenizer, [0] * 20 + [1], [2, 0]) == "es the"
    ids = ByT5Tokenizer()("größer", add_special_tokens=False)["input_ids"]
    assert tokenizer_files.text_after(ByT5Tokenizer(), ids, ids) == "größer"


def test_rows_of_a_vocabulary_with_gaps(bpe_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(bpe_folder, tmp_path / "bpe")
    file = tmp_path / "bpe/tokenizer.json"
    content = json.loads(file.read_text())
    size = len(content["model"]["vocab"])
    assert tokenizer_files.rows(tokenizer_files.load(bpe_folder)) == size
    content["model"]["vocab"]["far"] = size + 50
    file.write_text(json.dumps(content))
    assert tokenizer_files.rows(tokenizer_files.load(tmp_path / "bpe")) == size + 51


def test_code_beside_a_tokenizer_does_not_run(bpe_folder: Path, tmp_path: Path) -> None:
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    folder = folder_with(None, bpe_folder, tmp_path / "bpe", **own)
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    tokenizer_files.copy(folder, tmp_path / "copy")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "copy/mine.py").exists()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"--tokenizer .*bpe: no tokenizer can be loaded"):
        tokenizer_files.load(folder)
    assert not (tmp_path / "ran").exists()
