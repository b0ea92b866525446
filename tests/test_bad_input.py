"""A mistake costs seconds: `pretrain_yoco.py` ends with code 2 and one line that names it, before anything is started.

Every bad call is a good call with one thing wrong, and the good ones are run too.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from support.cli import TINY, run_script, train

from yoco_megatron.utils.ports import free_port

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Prefix of a small dataset that is whole."""
    prefix = str(tmp_path_factory.mktemp("data") / "corpus_text_document")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(7)
    for length in torch.randint(20, 200, (40,), generator=generator).tolist():
        builder.add_document(torch.randint(0, 255, (length,), generator=generator), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """Folder of a checkpoint after one step of the model that TINY describes."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    train(1, "--train-iters", "1", "--lr-warmup-iters", "0", "--save", folder, "--save-interval", "1")
    return folder


def without(flags: list[str], *removed: str) -> list[str]:
    """`flags` without some switches."""
    return [flag for flag in flags if flag not in removed]


def error_of(flags: list[str], processes: int = 1) -> str:
    """The one line that rank 0 prints."""
    for rank, (code, printed) in enumerate(run_script(processes, *flags)):
        assert code == 2, printed[-3000:]
        assert "Traceback" not in printed and " lm loss " not in printed
        lines = [line for line in printed.splitlines() if line.startswith("pretrain_yoco.py: error: ")]
        assert len(lines) == (1 if rank == 0 else 0), printed[-3000:]
        if rank == 0:
            assert printed.splitlines()[-1] == lines[0], "more lines follow"
            message = lines[0].removeprefix("pretrain_yoco.py: error: ")
    return message


# what is wrong -> (processes, flags added to TINY, what the line must say: the flag, and the way out)
MISTAKES = {
    "mesh": (2, ["--tensor-model-parallel-size", "3"], ["--tensor-model-parallel-size 3", "multiple of 3 processes"]),
    "odd layers": (1, ["--num-layers", "3"], ["--num-layers 3", "set --num-self-decoder-layers"]),
    "heads": (1, ["--num-attention-heads", "6"], ["--hidden-size 32", "--num-attention-heads 6", "change one"]),
    "self-decoder heads": (1, ["--self-decoder-heads", "3"], ["--self-decoder-heads 3", "change one"]),
    "context": (
        2,
        ["--context-parallel-size", "2", "--seq-length", "30"],
        ["--seq-length 30", "2 x --context-parallel-size 2 = 4", "each rank holds two chunks"],
    ),
    "batch": (2, ["--global-batch-size", "6"], ["--global-batch-size 6", "--micro-batch-size 2 x 2", "change one"]),
    "unknown flag": (1, ["--hiden-size", "32"], ["--hiden-size", "did you mean --hidden-size?"]),
    "not a number": (1, ["--hidden-size", "wide"], ["--hidden-size", "'wide'"]),
    "unknown config key": (1, ["--config", "hiden-size=32"], ["'hiden-size'", "did you mean hidden-size?"]),
    "missing config": (1, ["--config", "nowhere.yaml"], ["--config nowhere.yaml", "give the path"]),
    "a check of Megatron's": (
        1,
        ["--log-interval", "2", "--log-memory-interval", "3"],
        ["--log-memory-interval 3, --log-interval 2: Megatron needs"],
    ),
    "a rate": (1, ["--min-lr", "1"], ["--min-lr 1.0 must be at most --lr 0.01"]),
    "backend": (1, ["--retention-backend", "abacus"], ["--retention-backend abacus", "choose one of auto"]),
    "no tokenizer model": (1, ["--tokenizer-type", "HuggingFaceTokenizer"], ["--tokenizer-model is missing"]),
    "no such tokenizer": (
        1,
        ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/no/such/folder"],
        ["--tokenizer-model /no/such/folder does not exist"],
    ),
    "warm-up": (1, ["--lr-warmup-iters", "20"], ["--lr-warmup-iters 20 must be below --lr-decay-iters 20"]),
    "two lengths": (1, ["--train-samples", "9"], ["--train-iters and --train-samples", "keep one"]),
    "interval": (1, ["--log-interval", "0"], ["--log-interval 0 must be at least 1"]),
    "evaluation interval": (1, ["--eval-interval", "0"], ["--eval-interval 0 must be at least 1"]),
    "recompute": (
        1,
        ["--recompute-activations", "--recompute-modules", "ffn"],
        ["--recompute-modules ffn", "core_attn"],
    ),
    "bits that FP8 lacks": (
        1,
        [
            "--use-precision-aware-optimizer",
            "--use-distributed-optimizer",
            "--fp8-format",
            "hybrid",
            "--fp8-param-gather",
        ],
        ["--use-precision-aware-optimizer does not go with --fp8-param-gather", "use only one of them"],
    ),
    "two sources of data": (1, ["--data-path", "corpus"], ["--data-path and --mock-data", "keep one"]),
    "no checkpoint": (1, ["--load", "/no/such/folder"], ["--load /no/such/folder holds no checkpoint"]),
    "no old stage": (1, ["--pretrained-checkpoint", "/no/such"], ["--pretrained-checkpoint /no/such holds no"]),
    "no place": (1, ["--save", "/proc/run"], ["--save /proc/run: cannot write there"]),
    "no place for curves": (1, ["--tensorboard-dir", "/proc/run"], ["--tensorboard-dir /proc/run: cannot write"]),
    "no value": (1, ["--config"], ["--config", "expected at least one argument"]),
    "ends of a pipeline": (
        1,
        ["--decoder-first-pipeline-num-layers", "1"],
        ["--decoder-first-pipeline-num-layers needs --pipeline-model-parallel-size above 1"],
    ),
    "virtual stages": (
        2,
        shlex.split("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6"),
        ["--global-batch-size 6 gives a pipeline 3 micro-batches", "a multiple of", "= 4"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_on_the_command_line(mistake):
    processes, flags, said = MISTAKES[mistake]
    message = error_of([*TINY, *flags], processes)
    for part in said:
        assert part in message
    assert "instantiating" not in message, "nothing of how Megatron builds modules"


def test_good_data_trains(data):
    flags = [*without(TINY, "--mock-data"), "--data-path", data, "--train-iters", "1", "--lr-warmup-iters", "0"]
    ((code, printed),) = run_script(1, *flags)
    assert code == 0 and " 1/1  lm loss " in printed


def test_missing_data(data):
    message = error_of([*without(TINY, "--mock-data"), "--data-path", data.replace("_document", "")])
    assert "--data-path" in message and f"did you mean {data}?" in message
    message = error_of([*without(TINY, "--mock-data"), "--data-path", "0.5", data, "0.5", f"{data}.bin"])
    assert f"{data}.bin.idx is missing; give the prefix without .bin" in message
    message = error_of(without(TINY, "--mock-data"))
    assert "--data-path is missing" in message and "--mock-data" in message


def test_no_data_to_evaluate_on(data):
    flags = [*without(TINY, "--mock-data"), "--data-path", data, "--split", "1,0,0"]
    assert "--split 1,0,0 leaves nothing to evaluate on" in error_of(flags)


@pytest.mark.parametrize("flags", [["--fp8-format", "hybrid"], ["--tp-comm-overlap"]])
def test_without_the_layers_of_transformer_engine(flags):
    """Plain torch would train in bf16, or without overlap, and not say a word."""
    message = error_of([*TINY, "--bf16", *flags, "--transformer-impl", "local"])
    assert f"{flags[0]} needs the layers of Transformer Engine" in message


def test_a_tokenizer_without_words():
    place = TINY.index("--vocab-size")
    assert "--vocab-size is missing" in error_of([*TINY[:place], *TINY[place + 2 :]])


def test_truncated_data(data, tmp_path):
    prefix = tmp_path / "copy_text_document"
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).write_bytes(Path(data + suffix).read_bytes())
    os.truncate(f"{prefix}.bin", os.path.getsize(f"{prefix}.bin") - 2)
    message = error_of([*without(TINY, "--mock-data"), "--data-path", str(prefix)])
    assert "--data-path" in message and f"{prefix}.bin is shorter than its .idx says" in message
    assert message.endswith("copy both again")


OTHER_MODELS = {
    "wider": (["--hidden-size", "64"], ["hidden-size is 32 there, 64 here"]),
    "deeper": (["--num-layers", "6"], ["num-layers is 4 there, 6 here", "num-self-decoder-layers is 2 there, 3 here"]),
    "other self-decoder": (["--self-decoder", "sliding_window"], ["self-decoder is gated_retention there"]),
    "same shapes, other function": (["--rope-variant", "standard"], ["rope-variant is yoco there, standard here"]),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_checkpoint_of_another_architecture(other, saved):
    flags, said = OTHER_MODELS[other]
    message = error_of([*TINY, "--load", saved, *flags])
    assert message.startswith(f"--load {saved} holds another model: ") and "resolved_config.yaml" in message
    for part in said:
        assert part in message


def test_checkpoint_of_the_same_model_is_taken(saved):
    flags = [*TINY, "--load", saved, "--train-iters", "1", "--lr-warmup-iters", "0"]
    ((code, printed),) = run_script(1, *flags)
    assert code == 0 and "successfully loaded checkpoint" in printed


def test_old_stage_of_another_size_or_damaged(saved, tmp_path):
    message = error_of([*TINY, "--pretrained-checkpoint", saved, "--hidden-size", "64"])
    assert message.startswith(f"--pretrained-checkpoint {saved} holds another model: hidden-size is 32 there, 64 here")
    message = error_of([*TINY, "--pretrained-checkpoint", saved, "--vocab-size", "1000"])
    assert "padded-vocab-size is 256 there, 1024 here" in message
    assert "of the same tokenizer: --padded-vocab-size 256" in message
    damaged = shutil.copytree(saved, tmp_path / "damaged")
    (part,) = damaged.glob("iter_0000001/*.distcp")
    os.truncate(part, 100)
    message = error_of([*TINY, "--pretrained-checkpoint", str(damaged)])
    assert message.startswith(
        f"--pretrained-checkpoint {damaged}: the checkpoint of iteration 1 is not whole: {part.name}"
    )


OTHER_SCHEDULES = {
    "longer": ["--train-iters", "2"],
    "batch": ["--global-batch-size", "16"],
    "rate": ["--lr", "2e-2"],
    "lowest rate": ["--min-lr", "2e-4"],
    "decay": ["--weight-decay", "0.2"],
}
SAME_RUN = ["--train-iters", "1", "--lr-warmup-iters", "0"]


@pytest.mark.parametrize("other", OTHER_SCHEDULES)
def test_checkpoint_of_another_schedule(other, saved):
    message = error_of([*TINY, *SAME_RUN, "--load", saved, *OTHER_SCHEDULES[other]])
    assert message.startswith(f"--load {saved} was trained on another schedule: ")
    assert f"--pretrained-checkpoint {saved}" in message
    assert "--override-opt_param-scheduler for this one" in message


def test_checkpoint_of_another_schedule_is_taken_when_told(saved):
    flags = [*TINY, *SAME_RUN, "--load", saved, "--train-iters", "2", "--use-checkpoint-opt_param-scheduler"]
    ((code, printed),) = run_script(1, *flags)
    assert code == 0 and " 2/2  lm loss " in printed


def test_a_run_without_save_that_diverges():
    ((code, printed),) = run_script(1, *TINY, "--lr", "1e30", "--lr-warmup-iters", "0", "--train-iters", "5")
    assert code == 16 and "Traceback" not in printed, printed[-3000:]
    assert len(re.findall(r"^pretrain_yoco.py: error: .* of iteration \d is not a finite number", printed, re.M)) == 1


def test_a_run_without_an_interval_saves_at_its_end(tmp_path):
    flags = [*TINY, *SAME_RUN, "--eval-iters", "0", "--save", str(tmp_path)]
    ((code, printed),) = run_script(1, *flags)
    assert code == 0 and "--save-interval is missing: the run saves at its end alone" in printed
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


@pytest.mark.parametrize(
    ("flags", "where", "message"),
    [
        (["--num-layers", "3"], MEETING, "--num-layers 3 is odd"),
        (["--save", "checkpoints"], {}, "MASTER_ADDR and MASTER_PORT are not set: start it by torchrun"),
    ],
    ids=["a bad flag", "no torchrun"],
)
def test_the_way_a_user_starts_it(flags, where, message, tmp_path):
    """A fresh interpreter in another folder, no fork server: code, streams, and nothing written."""
    command = [sys.executable, str(ROOT / "pretrain_yoco.py"), *TINY, *flags]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", *MEETING)}
    ran = dict(capture_output=True, text=True, cwd=tmp_path, timeout=120)
    done = subprocess.run(command, env=environment | where, **ran)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"pretrain_yoco.py: error: {message}")
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_traceback_on_demand():
    with pytest.raises(AssertionError, match="ValueError: --num-layers 3 is odd"):
        run_script(1, *TINY, "--num-layers", "3", env={"YOCO_TRACEBACK": "1"})
