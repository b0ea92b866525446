"""A small suite of evaluation tasks, without anything that must be downloaded."""

import gzip
import json
from pathlib import Path

import yaml


def write_suite(folder: Path, length: int = 176) -> Path:
    """One task of each kind; of 3 requests and 5, which two processes do not share evenly."""
    texts = [f"{n} foxes return x_{n % 7}, the größer ones = {n * n}\n" for n in range(60)]
    (folder / "text.txt").write_text("".join(texts))
    benchmark = folder / "data" / "boolq" / "rc_0shot"
    benchmark.mkdir(parents=True)
    lines = [
        dict(doc={}, request=dict(context=text, continuation=choice), idx=index, doc_id=number, label=number % 2)
        for number, text in enumerate(texts[:3])
        for index, choice in enumerate((" no", " yes, quick"))
    ]
    (benchmark / "requests.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    (benchmark / "config.json").write_text(json.dumps({"task_config": {"split": "validation"}}))
    tasks = [
        dict(task="needle", lengths=[length], filler="noise", depths=2, samples=1),
        dict(task="multiple_choice", benchmarks=["boolq"], data=str(folder / "data")),
        dict(task="validation_loss", data=str(folder / "text.txt"), length=64),
    ]
    (folder / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return folder / "suite.yaml"
