"""Preprocessing: the datasets hold each line's own ids, in order, and appear whole or not at all."""

import copy
import gzip
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.training.config import TokenizerConfig
from tokenizers import processors

from yoco_megatron.corpus import documents as documents_module
from yoco_megatron.corpus import idx_writer as index_file
from yoco_megatron.corpus import preprocess as module
from yoco_megatron.corpus import readers
from yoco_megatron.corpus.preprocess import preprocess
from yoco_megatron.corpus.sentences import SentenceSplitter
from yoco_megatron.corpus.tokenizer_training import EOD, PAD, train_tokenizer
from yoco_megatron.data.tokenizer import build_tokenizer, id_limit

TEXTS = [f"document {n}: " + "words and größer words " * (n % 11) for n in range(57)]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "title": text[:12]}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([write_lines(folder / "corpus.jsonl", TEXTS)], 300, folder / "bpe")
    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "bpe")))


def run(files: list[Path], prefix: Path, tokenizer: Any, **more: Any) -> dict[str, module.Report]:
    options = {"keys": ["text"], "append_eod": True, "workers": 2} | more
    return preprocess(files, str(prefix), tokenizer, **options)


def documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[index].tolist() for index in range(len(dataset))]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [1, 4])
def test_datasets_hold_each_line_in_order(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(readers, "BATCH_RECORDS", 3)
    files = [write_lines(tmp_path / "b.jsonl", TEXTS[:20]), write_lines(tmp_path / "a.jsonl", TEXTS[20:])]
    reports = run(files, tmp_path / "out", tokenizer, keys=["text", "title"], workers=workers)

    expected = [[*tokenizer.tokenize(text), tokenizer.eod] for text in TEXTS]
    assert documents(tmp_path / "out_text_document") == expected
    titles = [[*tokenizer.tokenize(text[:12]), tokenizer.eod] for text in TEXTS]
    assert documents(tmp_path / "out_title_document") == titles
    index = IndexedDataset(str(tmp_path / "out_text_document"))
    assert index.document_indices.tolist() == list(range(len(TEXTS) + 1))
    assert index.index.dtype == np.uint16

    report = reports["text"]
    assert (report.documents, report.tokens) == (len(TEXTS), sum(map(len, expected)))
    assert report.bytes == sum(len(text.encode()) for text in TEXTS)
    assert report.tokens_per_second > 0
    assert json.loads((tmp_path / "out_text_document.json").read_text()) == asdict(report)


def test_without_eod_ids_are_the_text_alone(tokenizer: Any, tmp_path: Path) -> None:
    run([write_lines(tmp_path / "f.jsonl", TEXTS)], tmp_path / "out", tokenizer, append_eod=False)
    assert documents(tmp_path / "out_text_document") == [tokenizer.tokenize(text) for text in TEXTS]


def with_template(tokenizer: Any, single: str) -> Any:
    """A copy of the tokenizer with this template; ids 0 and 1 are its special tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    core = tokenizer._tokenizer.tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(EOD, 0), (PAD, 1)])
    return tokenizer


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize(
    ("single", "start", "end"), [(f"{PAD} $A", [1], []), (f"$A {EOD}", [], [0]), (f"{PAD} $A {EOD}", [1], [0])]
)
def test_a_template_is_around_documents_once(
    tokenizer: Any, tmp_path: Path, single: str, start: list[int], end: list[int], append_eod: bool
) -> None:
    """Not around sentences, not around an empty text, and an end that it has is not appended again."""

    class Halves:
        language, keep_newlines = "english", True

        def encoder(self, encode: Any) -> Any:
            splitter = object.__new__(SentenceSplitter)
            splitter.split = lambda text: [part for part in (text[: len(text) // 2], text[len(text) // 2 :]) if part]
            return splitter.encoder(encode)

    files = [write_lines(tmp_path / "f.jsonl", ["words and words", "", "größer"])]
    for name, sentences in (("whole", None), ("halves", Halves())):
        made = with_template(tokenizer, single)
        report = run(files, tmp_path / name, made, append_eod=append_eod, sentences=sentences)["text"]
        cut = [("words a", "nd words"), ("grö", "ßer")] if sentences else [("words and words",), ("größer",)]
        bare = [[token for part in parts for token in tokenizer.tokenize(part)] for parts in cut]
        ends = [0] if append_eod else end
        assert documents(tmp_path / f"{name}_text_document") == [[*start, *ids, *ends] for ids in bare]
        assert report.tokenizer == {"document_start": start, "eod": 0 if ends else None}
        assert report.empty_documents == 1


def test_text_that_spells_a_special_token_is_listed(tokenizer: Any, tmp_path: Path) -> None:
    """With its line, though it is not the first of its batch and an empty one comes before; split it is text."""
    texts = ["none", "", f"this {EOD} and {PAD} and {EOD}", "none"]
    path = write_lines(tmp_path / "f.jsonl", texts)
    report = run([path], tmp_path / "out", tokenizer, append_eod=False)["text"]
    assert (report.documents_with_special_tokens, report.documents) == (1, 3)
    assert documents(tmp_path / "out_text_document")[1] == tokenizer.tokenize(texts[2])
    listed = [json.loads(line) for line in Path(report.problems).read_text().splitlines()]
    assert [entry for entry in listed if entry["kind"] == "kept"] == [
        {"place": f"{path}:3", "reason": f"'text' holds special tokens: '{EOD}' (0), '{PAD}' (1)", "kind": "kept"}
    ]
    report = run([path], tmp_path / "split", tokenizer, append_eod=False, split_special_tokens=True)["text"]
    assert report.documents_with_special_tokens == 0
    found = documents(tmp_path / "split_text_document")[1]
    assert not {0, 1} & set(found) and tokenizer.detokenize(found) == texts[2]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(255, np.uint16), (65_499, np.uint16), (70_000, np.int32)])
def test_ids_that_the_vocabulary_lacks(tmp_path: Path, vocab_size: int, dtype: type[np.integer]) -> None:
    """Bad for one key is bad for all; what is no id at all is bad, too."""
    null = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=vocab_size))
    last = vocab_size - 1
    texts = ["1 2", f"1 {last} 2", f"1 {last + 1} 2", "5 -1", "one two", "9" * 30, "1 70001", ""]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({"text": text, "other": "7 8"}) + "\n" for text in texts))
    reports = run([path], tmp_path / "out", null, append_eod=False, keys=["text", "other"])
    assert documents(tmp_path / "out_text_document") == [[1, 2], [1, last, 2]]
    assert documents(tmp_path / "out_other_document") == [[7, 8]] * 3  # an empty text takes no other with it
    assert IndexedDataset(str(tmp_path / "out_text_document")).index.dtype == dtype
    assert (reports["text"].max_id, reports["other"].max_id, reports["text"].bad_lines) == (last, 8, 5)
    lines = Path(reports["text"].problems).read_text().splitlines()
    listed = {entry["place"]: entry["reason"] for entry in map(json.loads, lines) if entry["kind"] != "kept"}
    assert [int(place.rpartition(":")[2]) for place in listed] == [3, 4, 5, 6, 7, 8]
    assert f"'text' gives the token id {last + 1}, and those of the vocabulary end at {last}" in listed[f"{path}:3"]
    assert "cannot be encoded (invalid literal" in listed[f"{path}:5"]


def test_the_largest_id_decides_where_ids_have_gaps(tokenizer: Any) -> None:
    class Gapped:
        vocab_size, eod = 300, 0
        _tokenizer = type("", (), {"tokenizer": type("", (), {"get_vocab": lambda self: {"a": 0, "b": 70_000}})()})

    assert id_limit(Gapped()) == 70_001
    assert id_limit(tokenizer) == tokenizer.vocab_size


def test_empty_texts_are_counted_and_are_no_documents(tokenizer: Any, tmp_path: Path) -> None:
    report = run([write_lines(tmp_path / "f.jsonl", ["one", "", "two"])], tmp_path / "out", tokenizer)["text"]
    assert (report.documents, report.empty_documents) == (2, 1)
    with pytest.raises(ValueError, match=r"--input holds no text"):
        run([write_lines(tmp_path / "e.jsonl", [""])], tmp_path / "none", tokenizer)


def test_one_bad_line_too_many_stops_and_leaves_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BATCH_RECORDS", 4)
    path = write_lines(tmp_path / "f.jsonl", TEXTS)
    lines = path.read_text().splitlines(keepends=True)
    lines[30] = '{"text": broken\n'
    lines[31] = lines[40] = '{"title": "no text"}\n'
    path.write_text("".join(lines))
    for allowed, line in enumerate((31, 32, 41)):
        with pytest.raises(ValueError, match=rf"--input .*f\.jsonl:{line}: .* --max-bad-lines {allowed} "):
            run([path], tmp_path / "out", tokenizer, max_bad_lines=allowed)
        assert names(tmp_path) == ["f.jsonl"]
    with pytest.raises(ValueError, match=r"--max-bad-lines -1"):
        run([path], tmp_path / "out", tokenizer, max_bad_lines=-1)

    reports = run([path], tmp_path / "out", tokenizer, max_bad_lines=3, keys=["text", "title"])
    assert [reports[key].bad_lines for key in ("text", "title")] == [3, 3]
    assert [reports[key].documents for key in ("text", "title")] == [len(TEXTS) - 3] * 2


def test_a_wrong_key_ends_soon_and_is_named(tokenizer: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "f.jsonl", ["text"] * 5000)
    with pytest.raises(ValueError, match=r"f\.jsonl:1001: no text under the key 'txt' \(keys: text, title\)"):
        run([path], tmp_path / "out", tokenizer, keys=["txt"])
    write_lines(path, ["text"] * 50)
    with pytest.raises(ValueError, match=r"'txt' \(50 bad records, 0 empty, the first: .*f\.jsonl:1: no text under"):
        run([path], tmp_path / "out", tokenizer, keys=["txt"])
    assert names(tmp_path) == ["f.jsonl"]


def test_what_cannot_be_printed_is_listed_too(tokenizer: Any, tmp_path: Path) -> None:
    """A file name that is not UTF-8, half a surrogate pair among the keys, and more keys than anybody reads."""
    path = Path(os.fsdecode(bytes(tmp_path / "na") + b"\xefve.jsonl"))
    path.write_text('{"\\ud800": 1}\n{"text": "fine"}\n' + json.dumps({f"key{n}": n for n in range(9999)}))
    report = run([path], tmp_path / "out", tokenizer)["text"]
    listed = [json.loads(line) for line in Path(report.problems).read_text().splitlines()]
    assert (report.documents, report.bad_lines) == (1, 2)
    assert [entry["place"].rpartition("/")[2] for entry in listed] == [r"na\udcefve.jsonl:1", r"na\udcefve.jsonl:3"]
    assert r"\ud800" in listed[0]["reason"] and len(listed[1]["reason"]) == documents_module.REASON_LENGTH


def test_outputs_in_the_input_folder_are_no_input(tokenizer: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "f.jsonl", TEXTS)
    (tmp_path / "f_problems.txt").write_text("a text")
    first = run(readers.expand_inputs([str(tmp_path)]), tmp_path / "f", tokenizer)["text"]
    assert (first.documents, first.bad_lines) == (len(TEXTS) + 1, 0)
    (tmp_path / "f.unfinished").mkdir()
    (tmp_path / "f.unfinished" / "text.bin").write_bytes(b"\xff")
    again = run(readers.expand_inputs([str(tmp_path)]), tmp_path / "f", tokenizer, overwrite=True)["text"]
    assert again.files == first.files and again.inputs == first.inputs
    with pytest.raises(ValueError, match=r"--input names only files that"):
        run([tmp_path / "f_text_document.bin"], tmp_path / "f", tokenizer)


def test_an_input_named_like_an_output_of_another_key_is_read(tokenizer: Any, tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"out_{key}_document.json", TEXTS[:3]) for key in ("text", "x")]
    assert run(files, tmp_path / "out", tokenizer)["text"].inputs == [str(files[1])]


def test_existing_data_are_replaced_only_on_demand(tokenizer: Any, tmp_path: Path) -> None:
    path, out = write_lines(tmp_path / "f.jsonl", TEXTS), tmp_path / "out"
    run([path], out, tokenizer)
    old = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(ValueError, match=r"--output-prefix: .*out_text_document.idx exists.* --overwrite"):
        run([path], out, tokenizer)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        run([path, bad], out, tokenizer, overwrite=True, max_bad_lines=0)
    bad.unlink()
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == old
    run([write_lines(path, TEXTS[:5])], out, tokenizer, overwrite=True)
    assert len(documents(tmp_path / "out_text_document")) == 5


def test_index_is_the_last_to_appear(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that dies between the renames must not leave the index of data that are not there."""
    path, out = write_lines(tmp_path / "f.jsonl", TEXTS), tmp_path / "out"
    run([path], out, tokenizer)
    replace, done = os.replace, []

    def dies_at_the_index(source: str | Path, target: str | Path) -> None:
        if str(target).endswith(".idx"):
            raise OSError("power cut")
        done.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies_at_the_index)
    with pytest.raises(OSError, match=r"power cut"):
        run([write_lines(path, TEXTS[:5])], out, tokenizer, overwrite=True)
    assert done == ["state.json", "out_text_document.bin", "out_text_document.json"]
    monkeypatch.setattr(os, "replace", replace)
    assert "out_text_document.idx" not in names(tmp_path)
    run([path], out, tokenizer)  # what is left to do
    assert names(tmp_path) == ["f.jsonl", "out_text_document.bin", "out_text_document.idx", "out_text_document.json"]
    assert len(documents(tmp_path / "out_text_document")) == 5


def test_tokenizer_without_end_of_document_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    class NoEnd:
        eod = None

    with pytest.raises(ValueError, match=r"--append-eod"):
        run([write_lines(tmp_path / "f.jsonl", TEXTS)], tmp_path / "out", NoEnd())
    with pytest.raises(ValueError, match=r"--workers 0"):
        run([tmp_path / "f.jsonl"], tmp_path / "out", tokenizer, workers=0)


def test_gpt_dataset_trains_on_the_same_stream(tokenizer: Any, tmp_path: Path) -> None:
    """Every sample is a piece of the shuffled documents, and the last, padded one keeps padding out of the loss."""
    run([write_lines(tmp_path / "f.jsonl", TEXTS)], tmp_path / "out", tokenizer)
    prefix = tmp_path / "out_text_document"
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=32, blend=([str(prefix)], None), split="80,20,0", tokenizer=tokenizer,
        path_to_cache=str(tmp_path / "cache"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, drop_last_partial_validation_sequence=False,
    )  # fmt: skip
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [20, None, None], lambda: True, config)
    train, valid, test = builder.build()
    assert test is None
    every = documents(prefix)
    stream = [token for document in train.document_index for token in every[document]]
    samples = sorted((train.shuffle_index[index], index) for index in range(20))
    for place, index in samples:
        sample = train[index]
        begin = place * 32
        assert sample["tokens"].tolist() == stream[begin : begin + 32]
        assert sample["labels"].tolist() == stream[begin + 1 : begin + 33]
        assert sample["loss_mask"].sum() == 32

    held_out = sum(len(every[document]) for document in set(valid.document_index.tolist()))
    assert sum(int(valid[index]["loss_mask"].sum()) for index in range(len(valid))) == held_out - 1


def test_files_are_those_of_megatrons_builder(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte, for both item sizes, also where the index is written in several blocks."""
    monkeypatch.setattr(index_file, "BLOCK", 10)
    path = write_lines(tmp_path / "f.jsonl", TEXTS)
    for dtype in (np.uint16, np.int32):
        monkeypatch.setattr(DType, "optimal_dtype", lambda size, dtype=dtype: dtype)
        report = run([path], tmp_path / "out", tokenizer, overwrite=True)["text"]
        builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=dtype)
        for text in TEXTS:
            ids = [*tokenizer.tokenize(text), tokenizer.eod]
            builder.add_document(np.array(ids), [len(ids)])
        builder.finalize(str(tmp_path / "megatron.idx"))
        for suffix, about in report.files.items():
            ours = (tmp_path / f"out_text_document.{suffix}").read_bytes()
            assert ours == (tmp_path / f"megatron.{suffix}").read_bytes()
            digest = hashlib.sha256(ours).hexdigest()  # a small file is its own sample
            sampled = {"sampled_sha256": digest} if suffix == "bin" else {}
            assert about == {"bytes": len(ours), "sha256": digest} | sampled


def test_every_odd_record_is_counted_and_listed(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    records = ['{"text": "a\\u0000b"}', '{"text": ""}', "{", '{"text": "good"}', '{"title": ""}']
    path.write_text("\n".join(records))
    report = run([path], tmp_path / "out", tokenizer)["text"]
    assert (report.documents, report.bad_lines, report.empty_documents, report.documents_with_nul) == (2, 2, 1, 1)
    listed = [json.loads(line) for line in (tmp_path / "out_problems.jsonl").read_text().splitlines()]
    assert report.problems == str(tmp_path / "out_problems.jsonl")
    assert [(entry["place"], entry["kind"]) for entry in listed] == [
        (f"{path}:1", "kept"), (f"{path}:2", "empty"), (f"{path}:3", "bad"), (f"{path}:5", "bad"),
    ]  # fmt: skip
    expected = [[*tokenizer.tokenize(text), tokenizer.eod] for text in ("a\0b", "good")]
    assert documents(tmp_path / "out_text_document") == expected
    path.write_text('{"text": "good"}\n')  # nothing odd any more: the list of the old data goes
    assert run([path], tmp_path / "out", tokenizer, overwrite=True)["text"].problems == ""
    assert not (tmp_path / "out_problems.jsonl").exists()


@pytest.mark.parametrize(("backend", "sentences"), [("gigatoken", 2_100_000), ("library", 210_000)])
def test_a_corpus_with_everything_wrong(tokenizer: Any, tmp_path: Path, backend: str, sentences: int) -> None:
    """Every record is a document or is listed, in plain and in compressed files; one document has 50 MB, or 5."""
    if backend == "gigatoken":
        pytest.importorskip("gigatoken")
    lines = [b'{"text": "good"}', b'{"text": "cut', b'{"text": ""}', b'{"text": "\xff\xfe"}', b'{"title": "no text"}']
    lines += [b'{"text": "a\\u0000b"}', b"[1, 2]", b'{"text": 7}', b"", b'{"text": "gr\xc3\xb6\xc3\x9fer"}']
    sentence = " words and größer words\n"
    small = b"\n".join(lines) + b"\n"
    contents = {
        "a.jsonl": small + json.dumps({"text": sentence * sentences}).encode() + b"\n",
        "b.jsonl.gz": gzip.compress(small),
        "c.jsonl.zst": zstandard.compress(small),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in contents]
    report = run(files, tmp_path / "out", tokenizer, backend=backend)["text"]
    assert report.backend == {"library": "tokenizers"}.get(backend, backend)
    assert (report.documents, report.bad_lines, report.empty_documents, report.documents_with_nul) == (10, 15, 3, 3)
    listed = [json.loads(line) for line in (tmp_path / "out_problems.jsonl").read_text().splitlines()]
    places = {"bad": (2, 4, 5, 7, 8), "empty": (3,), "kept": (6,)}
    for kind, numbers in places.items():
        found = [entry["place"] for entry in listed if entry["kind"] == kind]
        assert found == [f"{path}:{number}" for path in files for number in numbers], kind
    short = ["good", "a\0b", "größer"]
    found = documents(tmp_path / "out_text_document")
    once = tokenizer.tokenize(sentence)
    assert np.array_equal(found.pop(3)[:-1], once * sentences)
    assert found == [[*tokenizer.tokenize(text), tokenizer.eod] for text in short * 3]


def test_a_document_too_long_for_an_index_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index counts in 32 bits."""
    monkeypatch.setattr(documents_module, "MAX_TOKENS", 5)
    path = write_lines(tmp_path / "f.jsonl", ["a", "123456789"])
    with pytest.raises(ValueError, match=r"--input .*f\.jsonl: a document of 10 tokens .* counts up to 5"):
        run([path], tmp_path / "out", tokenizer)


def test_a_document_of_50_mb(tokenizer: Any, tmp_path: Path) -> None:
    """Between two short ones; its ids are those of one sentence, as often as it is in there."""
    pytest.importorskip("gigatoken")
    sentence, times = " words and größer words\n", 2_100_000
    path = write_lines(tmp_path / "f.jsonl", ["short", sentence * times, "last"])
    assert path.stat().st_size > 50_000_000
    report = run([path], tmp_path / "out", tokenizer)["text"]
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert (report.backend, len(dataset)) == ("gigatoken", 3)
    once = tokenizer.tokenize(sentence)
    assert tokenizer.tokenize(sentence * 3) == once * 3  # no token spans two sentences
    assert dataset[1][-1] == tokenizer.eod
    assert (dataset[1][:-1].reshape(times, len(once)) == once).all()
    assert dataset[2].tolist() == [*tokenizer.tokenize("last"), tokenizer.eod]
