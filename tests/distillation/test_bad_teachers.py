"""A teacher that does not fit is one error that names the flag, before the first step."""

import json
from pathlib import Path

import pytest
from support.cli import TINY, TINY_BASELINE, Runs
from support.teachers import teacher_for_training

pytest.importorskip("transformers")

TRANSFER = ["--attention-transfer"]
WIDTH = dict(hidden_size=32, intermediate_size=64)
# name -> (fields of the teacher, flags, what the error says)
ALONE: dict[str, tuple[dict, list[str], str]] = {
    "vocabulary": (dict(vocab_size=128), [], "vocabulary of 128, the tokenizer one of 255"),
    "larger vocabulary": (dict(vocab_size=300), [], "vocabulary of 300, .* the model one of 256"),
    "width": ({}, TRANSFER, "--hidden-size 32 must be the teacher's 48"),
    "mixed windows": (
        dict(family="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2), [],
        "windows of 8 in some layers alone",
    ),
    "layers": (WIDTH | dict(num_hidden_layers=3), TRANSFER, "--num-layers 4 must be the teacher's 3"),
    "whole logits": ({}, ["--loss-chunk-size", "0"], "needs the loss in chunks"),
    "weight": ({}, ["--distillation-weight", "1.5"], "--distillation-weight 1.5 must be from 0 to 1"),
    "temperature": ({}, ["--distillation-temperature", "0"], "--distillation-temperature 0.0 must be above 0"),
    "recompute": (WIDTH, [*TRANSFER, "--recompute-granularity", "full", "--recompute-method", "uniform",
                          "--recompute-num-layers", "1"], "remove --recompute-granularity full"),
}  # fmt: skip
TWO: dict[str, tuple[dict, list[str], str]] = {
    "K,V heads": (dict(num_key_value_heads=1), ["--tensor-model-parallel-size", "2"], "divide its 1 K,V heads"),
    "stages": (
        dict(num_hidden_layers=6), ["--pipeline-model-parallel-size", "2"], "has 6 layers, and the student 4"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("processes", "cases"), [(1, ALONE), (2, TWO)], ids=["alone", "two ranks"])
def test_one_error(processes: int, cases: dict, tmp_path: Path) -> None:
    runs, said = {}, {}
    for name, (fields, flags, text) in cases.items():
        folder = teacher_for_training(tmp_path / name.replace(" ", "_").replace(",", ""), **fields)
        runs[name], said[name] = [*TINY, "--teacher", str(folder), *flags], text
    if processes == 1:
        runs["alone"], said["alone"] = [*TINY, *TRANSFER], "--attention-transfer has no effect without --teacher"
        runs["none"], said["none"] = [*TINY, "--teacher", str(tmp_path / "nothing")], "--teacher .*no such folder"
        runs["baseline"] = [*TINY_BASELINE, "--teacher", str(tmp_path / "width")]
        said["baseline"] = "--teacher .* is for a YOCO"
        folder = teacher_for_training(tmp_path / "shards")
        index = {"weight_map": {"model.norm.weight": "lost.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        runs["shard"], said["shard"] = [*TINY, "--teacher", str(folder)], "lost.safetensors is missing"
    done = Runs(processes, runs)
    for name, text in said.items():
        with pytest.raises(AssertionError, match=f"ValueError: .*{text}"):
            done[name]
