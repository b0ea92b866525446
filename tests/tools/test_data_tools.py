"""The data command lines end to end, as a user runs them: text -> corpus -> tokenizer -> indexed dataset -> report."""

import gzip
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.tools import ROOT, run, start
from tokenizers import Tokenizer

from yoco_megatron.data.tokenizer import tokenizer_sha256

TOKENIZER = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]


def start_alone(
    tool: str, *arguments: object, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """tools/TOOL.py in an interpreter that imports what it needs itself; `before` runs in its process."""
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder with everything made, and what each tool printed."""
    folder = tmp_path_factory.mktemp("tools")
    for number in range(40):
        path = folder / "source" / f"module{number}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"def function_{number}(größe):\n    return größe * {number}\n" * (1 + number % 5))
    (folder / "source" / "binary.py").write_bytes(b"\xff\xfe")
    (folder / "source" / "readme.txt").write_text("not a Python file")
    corpus, bpe, prefix = folder / "corpus.jsonl", folder / "bpe", folder / "out" / "code"
    said = {
        "gather": run("gather_text", "--input", folder / "source", "--glob", "*.py", "--output", corpus),
        "train": run("train_tokenizer", "--input", corpus, "--vocab-size", 320, "--output", bpe),
        "preprocess": run(
            "preprocess_data", "--input", folder / "*.jsonl", "--json-keys", "text", *TOKENIZER, bpe,
            "--append-eod", "--workers", 2, "--output-prefix", prefix,
        ),
    }  # fmt: skip
    return folder, said


def test_dataset_is_the_corpus_text_by_text(made: tuple[Path, dict[str, str]]) -> None:
    folder, _ = made
    tokenizer = Tokenizer.from_file(str(folder / "bpe" / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").open(encoding="utf-8")]
    dataset = IndexedDataset(str(folder / "out" / "code_text_document"))
    assert len(dataset) == len(texts) == 40
    for index, text in enumerate(texts):
        assert dataset[index].tolist() == [*tokenizer.encode(text).ids, tokenizer.token_to_id("<|endoftext|>")]
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == [f"code_text_document.{suffix}" for suffix in ("bin", "idx", "json")]


def test_tools_tell_what_they_did(made: tuple[Path, dict[str, str]]) -> None:
    folder, said = made
    size = sum(path.stat().st_size for path in (folder / "source").glob("module*.py"))
    assert f"40 documents, {size:,} bytes" in said["gather"]
    assert "1 files that are not UTF-8" in said["gather"]
    digest = tokenizer_sha256(str(folder / "bpe"))
    assert f"320 tokens, sha256 {digest}" in said["train"]
    report = json.loads((folder / "out" / "code_text_document.json").read_text())
    assert report["tokenizer"]["sha256"] == digest
    assert (report["documents"], report["bytes"], report["bad_lines"]) == (40, size, 0)
    assert f"40 documents, {report['tokens']:,} tokens (uint16)" in said["preprocess"]


def test_inspect_prints_text_and_json(made: tuple[Path, dict[str, str]]) -> None:
    folder, _ = made
    prefix = folder / "out" / "code_text_document"
    report = json.loads(Path(f"{prefix}.json").read_text())
    content = json.loads(run("inspect_dataset", "--data-path", prefix, "--json"))
    assert (content["documents"], content["tokens"]) == (40, report["tokens"])
    assert 2 < content["unigram_entropy_nats"] < 5.8  # log of the vocabulary's size is 5.77
    part = run("inspect_dataset", "--data-path", prefix, "--split", "90,10", "--part", "valid")
    assert f"40 documents, {report['tokens']:,} tokens" in part
    assert "unigram entropy of part valid of 90,10: " in part


def test_truncated_data_are_refused(made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, _ = made
    for suffix, kept in (("bin", -2), ("idx", None)):
        whole = (folder / "out" / f"code_text_document.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[:kept])
    error = run("inspect_dataset", "--data-path", tmp_path / "cut", fails=True)
    assert "--data-path" in error
    assert "cut.bin is shorter than its .idx says" in error


def test_bad_lines_are_shown_and_may_end_preprocessing(made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, _ = made
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n' + '{"text"\n' * 12)
    arguments = ["--input", bad, *TOKENIZER, folder / "bpe", "--output-prefix", tmp_path / "out"]
    error = run("preprocess_data", *arguments, "--max-bad-lines", 11, fails=True)
    assert "bad.jsonl:13" in error and "--max-bad-lines" in error
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    done = start("preprocess_data", *arguments)
    assert "1 documents" in done.stdout and "12 bad records" in done.stdout
    assert "WARNING: 12 bad records are skipped:" in done.stderr
    assert re.findall(r"bad\.jsonl:(\d+): not a line of JSON", done.stderr) == [str(n) for n in range(2, 12)]
    assert f"listed in {tmp_path}/out_problems.jsonl" in done.stderr


def test_a_full_disk_is_one_error_and_the_run_goes_on(made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """No file may become larger than 64 KiB, which is how the write fails; then it may."""
    folder, _ = made
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes((folder / "corpus.jsonl").read_bytes() * 200)
    arguments = ["--input", corpus, *TOKENIZER, folder / "bpe", "--output-prefix", tmp_path / "out"]
    small = (1 << 16, 1 << 16)
    done = start_alone("preprocess_data", *arguments, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small))
    assert done.returncode == 2
    assert re.search(r"error: --output-prefix .*out: .*File too large.* Repeat the command", done.stderr)
    assert "Traceback" not in done.stderr and not (tmp_path / "out_text_document.idx").exists()
    assert "8,000 documents" in run("preprocess_data", *arguments)


def test_an_input_that_cannot_be_read_is_not_the_outputs_fault(
    made: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = made
    arguments = ["--input", tmp_path / ("x" * 300), *TOKENIZER, folder / "bpe", "--output-prefix", tmp_path / "out"]
    error = run("preprocess_data", *arguments, fails=True).split("error: ")[-1]
    assert error.startswith("--input ") and "File name too long" in error and "--output-prefix" not in error


def test_inspect_shows_documents_and_lengths_and_verifies(made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, _ = made
    prefix = folder / "out" / "code_text_document"
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").open(encoding="utf-8")]
    png = tmp_path / "lengths.png"
    said = run(
        "inspect_dataset", "--data-path", prefix, "--samples", 3, "--sample-tokens", 10_000, "--verify",
        "--histogram", png,
    )  # fmt: skip
    shown = re.findall(r"== document (\d+), (\d+) tokens\n(.*?)<\|endoftext\|>", said, re.DOTALL)
    assert len(shown) == 3
    dataset = IndexedDataset(str(prefix))
    lengths = dataset.sequence_lengths
    for number, length, text in shown:
        assert text == texts[int(number)] and int(length) == lengths[int(number)]
    assert f"tokens per document: {lengths.min()} to {lengths.max()}" in said
    assert ".bin is whole" in said and ".idx is whole" in said
    assert png.read_bytes().startswith(b"\x89PNG")

    for suffix in ("bin", "idx", "json"):
        (tmp_path / f"copy.{suffix}").write_bytes(Path(f"{prefix}.{suffix}").read_bytes())
    run("inspect_dataset", "--data-path", tmp_path / "copy", "--verify")
    damaged = bytearray((tmp_path / "copy.bin").read_bytes())
    damaged[5] ^= 1
    (tmp_path / "copy.bin").write_bytes(damaged)
    error = run("inspect_dataset", "--data-path", tmp_path / "copy", "--verify", fails=True)
    assert "copy.json describes another" in error
    (tmp_path / "copy.json").unlink()
    said = run("inspect_dataset", "--data-path", tmp_path / "copy", "--verify")
    assert ".bin fits its pair, and has no checksum to be compared with: sha256" in said


def test_merge_and_its_errors(made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, _ = made
    prefix = folder / "out" / "code_text_document"
    arguments = ["--input", prefix, prefix, "--output-prefix", tmp_path / "two"]
    merged = run("merge_datasets", *arguments)
    assert "80 documents" in merged
    flags = shlex.split(merged.splitlines()[-1].removeprefix("train on it with: "))
    assert flags == ["--data-path", f"{tmp_path}/two_text_document", *TOKENIZER, str(folder / "bpe")]
    two = tmp_path / "two_text_document"
    assert Path(f"{two}.bin").read_bytes() == Path(f"{prefix}.bin").read_bytes() * 2
    assert "80 documents" in run("inspect_dataset", "--data-path", two, "--verify")
    assert "--overwrite" in run("merge_datasets", *arguments, fails=True)


def test_conversations_from_lines_to_a_merged_dataset(made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """With a template from a file; what is learned is shown."""
    talk = [{"role": "user", "content": "größer?"}, {"role": "assistant", "content": "Yes 🙂"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"text": "none"}))
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
    flags = ["--input", tmp_path / "talks.jsonl", "--data-format", "messages", *TOKENIZER, made[0] / "bpe"]
    flags += ["--output-prefix", tmp_path / "out"]
    assert "error: --tokenizer-model: the tokenizer has no chat" in run("preprocess_data", *flags, fails=True)
    error = run("preprocess_data", *flags, "--chat-template", tmp_path / "none", fails=True)
    assert f"error: --chat-template: {tmp_path}/none is missing" in error
    done = start("preprocess_data", *flags, "--chat-template", template)
    assert re.search(r"out_messages_document_loss_mask: \d+ tokens are learned, \d\d\.\d% of all", done.stdout)
    assert "talks.jsonl:2: no key 'messages' (keys: text)" in done.stderr
    prefix = tmp_path / "out_messages_document"
    run("merge_datasets", "--input", prefix, prefix, "--output-prefix", tmp_path / "two")
    said = run("inspect_dataset", "--data-path", tmp_path / "two_messages_document", "--samples", 1, "--verify")
    assert "user: größer?\n⟦assistant: Yes 🙂\n⟧" in said and "2 documents" in said
    assert re.search(r"learned: \d+ tokens, ", said) and "_loss_mask.bin is whole" in said


ALL = [path.stem for path in ROOT.glob("tools/*.py")]


@pytest.mark.parametrize(
    ("tool", "flag"), [(tool, "--help") for tool in ALL] + [("plan_data", "-h"), ("prepare_cache", "-h")]
)
def test_help_is_no_error(tool: str, flag: str) -> None:
    done = start_alone(tool, flag)
    assert done.returncode == 0 and len(done.stdout) > 200, done.stderr


MISTAKES = {
    "glob": ("gather_text", "--python-stdlib --glob *.md --output {0}/x.jsonl", "--glob goes with --input"),
    "corpus": ("gather_text", "--input {0}/source --output /proc/x/corpus.jsonl", "--output /proc/x/corpus.jsonl: "),
    "text": (
        "gather_text",
        "--input {0}/source --output {0}/source/readme.txt",
        "--output {0}/source/readme.txt exists and was not written by this tool: name another file",
    ),
    "size": ("train_tokenizer", "--input {0}/corpus.jsonl --output {0}/x", "--vocab-size is missing"),
    "place": ("train_tokenizer", "--bytes --output /proc/x/y", "--output /proc/x/y: "),
    "lang": (
        "preprocess_data",
        "--input {0}/corpus.jsonl --tokenizer-type HuggingFaceTokenizer --tokenizer-model {0}/bpe --keep-newlines "
        "--output-prefix {0}/x",
        "--keep-newlines and --lang have no effect without --split-sentences",
    ),
    "format": (
        "preprocess_data",
        "--input {0}/corpus.jsonl --tokenizer-type HuggingFaceTokenizer --tokenizer-model {0}/bpe --chat-template x "
        "--output-prefix {0}/x",
        "--chat-template has no effect without --data-format messages",
    ),
    "model": (
        "preprocess_data",
        "--input {0}/corpus.jsonl --tokenizer-type HuggingFaceTokenizer --output-prefix {0}/x",
        "--tokenizer-model is missing",
    ),
    "split": (
        "inspect_dataset",
        "--data-path {0}/out/code_text_document --split most --part train",
        "--split most: give the shares",
    ),
    "picture": (
        "inspect_dataset",
        "--data-path {0}/out/code_text_document --histogram {0}/lengths.xyz",
        "--histogram {0}/lengths.xyz: ",
    ),
    "merged": ("merge_datasets", "--input {0}/nothing --output-prefix {0}/x", "--input: {0}/nothing.idx is missing"),
    "output": (
        "merge_datasets",
        "--input {0}/out/code_text_document --output-prefix /proc/x/y",
        "--output-prefix /proc/x/y: ",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_error(mistake: str, made: tuple[Path, dict[str, str]]) -> None:
    tool, words, said = MISTAKES[mistake]
    error = run(tool, *words.format(made[0]).split(), fails=True)
    assert f"{tool}.py: error: {said.format(made[0])}" in error.splitlines()[-1]
    assert "Traceback" not in error and len(error.splitlines()) < 9


def test_a_tokenizer_of_a_packed_corpus_is_that_of_the_corpus(
    made: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder, _ = made
    compressed = tmp_path / "corpus.jsonl.gz"
    compressed.write_bytes(gzip.compress((folder / "corpus.jsonl").read_bytes()))
    run("train_tokenizer", "--input", compressed, "--vocab-size", 320, "--output", tmp_path / "bpe")
    assert (tmp_path / "bpe/tokenizer.json").read_bytes() == (folder / "bpe/tokenizer.json").read_bytes()


def test_mistakes_of_a_cache(made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    configs = ["--config", ROOT / "configs/model/yoco_tiny.yaml", ROOT / "configs/recipe/demo.yaml"]
    data = ["--data-path", made[0] / "out" / "code_text_document", "--split", "8,1,1"]
    done = start("prepare_cache", *configs, *data, "--data-cache-path", tmp_path)
    assert done.returncode == 1 and "error: --tokenizer-type is missing" in done.stderr.splitlines()[-1]
    done = start("prepare_cache", *configs, *data, *TOKENIZER, made[0] / "bpe", "--data-cache-path", "/proc/x")
    assert done.returncode == 1 and "error: --data-cache-path: " in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("report", ["[1", "[]", '{"files": 3}', '{"files": {"bin": {}}}', '{"tokenizer": "bpe"}'])
def test_a_damaged_report_is_one_error(report: str, made: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        (tmp_path / f"copy.{suffix}").write_bytes((made[0] / "out" / f"code_text_document.{suffix}").read_bytes())
    (tmp_path / "copy.json").write_text(report)
    error = run("inspect_dataset", "--data-path", tmp_path / "copy", "--verify", fails=True)
    said = error.splitlines()[-1]
    assert f"error: --data-path: {tmp_path}/copy.json " in said and "no report of tools/preprocess_data.py" in said
    assert "Traceback" not in error
