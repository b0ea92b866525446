"""A teacher whose upper layers all get the self-decoder's output: a YOCO with a set of K,V for each is that teacher,
and one whose set is the mean of two layers' becomes it by attention transfer."""

import shlex
from pathlib import Path

import pytest
import safetensors.torch
from support.cli import Log, Runs
from support.teachers import teacher_for_training
from support.tools import run

pytest.importorskip("transformers")

STEPS = 120
COMMON = """
tokenizer-type=null vocab-size=null bf16=false --mock-data --split 90,5,5 --tokenizer-type NullTokenizer
--vocab-size 255 --seq-length 32 --micro-batch-size 8 --global-batch-size 8 --eval-iters 1 --eval-interval 200
--log-interval 1 --num-workers 0 --min-lr 0 --lr-decay-style linear --lr-warmup-iters 1
"""
FIT = ["--attention-transfer", "--train-iters", str(STEPS), "--lr", "2e-2", "--clip-grad", "1.0"]
STAY = ["--train-iters", "2", "--lr", "1e-9"]


def flags(start: Path, teacher: Path, *more: str) -> list[str]:
    given = ["--config", f"{start}/resolved_config.yaml", *shlex.split(COMMON)]
    return [*given, "--teacher", str(teacher), "--pretrained-checkpoint", str(start), *more]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Log]:
    folder = tmp_path_factory.mktemp("limit")
    teacher = teacher_for_training(folder / "teacher", hidden_size=32, intermediate_size=64)
    state = safetensors.torch.load_file(teacher / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        state[f"model.layers.2.{name}.weight"].zero_()
    safetensors.torch.save_file(state, teacher / "model.safetensors", {"format": "pt"})
    for sets in (1, 2):
        windows = ("--self-decoder", "sliding_window", "--self-decoder-window", 32, "--shared-kv-sets", sets)
        run("upcycle", "--teacher", teacher, "--to", "megatron", "--output", folder / str(sets), *windows)
    runs = {
        "two sets": flags(folder / "2", teacher, *STAY),
        "two sets, transfer": flags(folder / "2", teacher, *STAY, "--attention-transfer"),
        "one set, transfer": flags(folder / "1", teacher, *FIT),
    }
    return Runs(1, runs)


def test_it_is_the_teacher(logs: dict[str, Log]) -> None:
    """Up to fp32: the divergence is a difference of logarithms, the transfer loss a relative square."""
    assert abs(logs["two sets"].of_term("distillation loss")[1]) < 1e-6
    assert logs["two sets, transfer"].of_term("attention transfer loss")[1] < 1e-11


def test_transfer_reaches_it(logs: dict[str, Log]) -> None:
    losses = logs["one set, transfer"].of_term("attention transfer loss")
    assert losses[1] > 0.05 and losses[STEPS] < losses[1] / 50
