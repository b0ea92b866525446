"""A killed run resumes where it last saved, and gives the bytes that an undisturbed run gives."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.training.config import TokenizerConfig

from yoco_megatron.corpus import preprocess as module
from yoco_megatron.corpus import readers
from yoco_megatron.corpus.preprocess import preprocess
from yoco_megatron.corpus.tokenizer_training import train_tokenizer
from yoco_megatron.data.tokenizer import build_tokenizer

# Saves after every batch of three records and kills itself, as nothing can catch, at its nth write of a batch.
KILLED = """
import os, signal, sys
from pathlib import Path
from megatron.training.config import TokenizerConfig
from yoco_megatron.corpus import preprocess as module, readers
from yoco_megatron.data.tokenizer import build_tokenizer
folder, batches = Path(sys.argv[1]), int(sys.argv[2])
readers.BATCH_RECORDS = 3
append, left = module._append, iter(range(batches))
def dying(unfinished, *more):
    append(unfinished, *more)
    module.SAVE_SECONDS = 0 if next(left, None) is not None else 1e9
    if module.SAVE_SECONDS:
        for stream in unfinished.files.values():
            stream.write(b"half a record")
            stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
module._append = dying
tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "bpe")))
files = [Path(path) for path in sys.argv[3:]]
module.preprocess(files, str(folder / "out"), tokenizer, keys=["text"], append_eod=True, workers=2)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = random.Random(5)
    texts = ["größer words " * generator.randrange(40) for _ in range(100)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[17], lines[50] = '{"text": broken', '{"text": "nul \\u0000 in it"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[::-1]).encode()))
    for number, text in enumerate(texts[:7]):
        (tmp_path / f"c{number}.txt").write_text(text)
    train_tokenizer([write(tmp_path / "clean.jsonl", texts)], 300, tmp_path / "bpe")
    return tmp_path


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def inputs(folder: Path) -> list[Path]:
    return [folder / "a.jsonl", *sorted(folder.glob("c*.txt")), folder / "b.jsonl.gz"]


def run(folder: Path, name: str, **more: Any) -> dict[str, module.Report]:
    tokenizer = build_tokenizer(
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "bpe"))
    )
    options = {"keys": ["text"], "append_eod": True, "workers": 2} | more
    return preprocess(inputs(folder), str(folder / name), tokenizer, **options)


def kill_after(folder: Path, batches: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, str(batches), *inputs(folder)],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "out_text_document.idx").exists()


def test_killed_again_and_again_it_gives_the_same_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batches in (20, 15, 25):  # within the first file; beyond the text files; in the compressed file
        kill_after(folder, batches)
    state = json.loads((folder / "out.unfinished" / "state.json").read_text())["state"]
    assert state["position"][0] == len(inputs(folder)) - 1
    read: list[int] = []
    texts = readers.Batch.texts
    monkeypatch.setattr(
        readers.Batch, "texts", lambda batch, keys: (read.append(len(batch.records)), texts(batch, keys))[1]
    )
    report = run(folder, "out")["text"]
    assert sum(read) < 60, "it began anew"
    whole = run(folder, "whole")["text"]
    for name in ("text_document.bin", "text_document.idx", "problems.jsonl"):
        assert (folder / f"out_{name}").read_bytes() == (folder / f"whole_{name}").read_bytes()
    different = {"seconds", "tokens_per_second", "problems"}
    assert all(vars(report)[name] == value for name, value in vars(whole).items() if name not in different)
    assert report.bad_lines == 2 and report.documents_with_nul == 2 and report.documents > 190
    assert not (folder / "out.unfinished").exists()


def test_another_job_does_not_go_on(folder: Path) -> None:
    kill_after(folder, 20)
    with pytest.raises(ValueError, match=r"out\.unfinished holds an unfinished run whose eod differed; .*--overwrite"):
        run(folder, "out", append_eod=False)
    with (folder / "a.jsonl").open("a") as stream:
        stream.write('\n{"text": "one more"}')
    with pytest.raises(ValueError, match=r"whose input differed"):
        run(folder, "out")
    assert run(folder, "out", overwrite=True)["text"].files == run(folder, "whole")["text"].files


def test_fewer_bad_lines_than_were_left_out(folder: Path) -> None:
    """Nor is it an error when the next batch holds none."""
    kill_after(folder, 20)
    with pytest.raises(ValueError, match=r"--max-bad-lines 0: the unfinished run .*out\.unfinished left out 1 already"):
        run(folder, "out", max_bad_lines=0)
    assert run(folder, "out", max_bad_lines=2)["text"].bad_lines == 2


def test_two_processes_do_not_write_at_once(folder: Path) -> None:
    first = module.ResumeState(folder / "out.unfinished", ["text.bin"], {})
    with pytest.raises(ValueError, match=r"--output-prefix: another process is writing .*out\.unfinished"):
        run(folder, "out")
    first.close(keep=False)
    run(folder, "out")
