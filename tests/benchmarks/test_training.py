"""How the training benchmark chooses micro-batches and reads failures; the runs themselves are stand-ins."""

import argparse
import json
from pathlib import Path

import cases
import pytest
import training
from mesh import Mesh
from runs import MOCK, Failure, Run, last_error

from yoco_megatron import runtime
from yoco_megatron.startup import arguments, checks

ONE = Mesh.of("1")


def test_micro_batches_of_all_and_of_one() -> None:
    assert training.micro_batches(["2", "4", "GPT=1"]) == {
        "GPT": [1],
        "gated_retention": [4, 2],
        "sliding_window": [4, 2],
    }
    assert training.micro_batches(["GPT=1,2"])["sliding_window"] == [1]


@pytest.mark.parametrize("item", ["0", "LLAMA=1", "GPT=", "two"])
def test_micro_batches_that_mean_nothing_are_refused(item: str) -> None:
    with pytest.raises(ValueError, match="--micro-batches"):
        training.micro_batches([item])


def test_a_lack_of_memory_is_told_from_other_failures() -> None:
    log = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 12 GiB\nRuntimeError: NCCL error: aborted"
    assert Failure(last_error(log)).out_of_memory
    assert not Failure(last_error("ValueError: --flag is wrong")).out_of_memory


def options_of(tmp_path: Path, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cases.add_arguments(parser)
    options = parser.parse_args([*argv, "--output", str(tmp_path / "rows.jsonl")])
    options.micro_batches = ["8", "2"]
    return options


def test_what_does_not_fit_is_halved_and_the_fastest_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def attempt(name: str, flags: str, gpus: int, timeout: int, verbose: bool, script: str) -> Run | Failure:
        words = flags.split()
        size = int(words[words.index("--micro-batch-size") + 1])
        asked.append(size)
        assert gpus == 1 and words[words.index("--global-batch-size") + 1] == "8"
        if size > 4:
            return Failure("CUDA out of memory")
        return Run(2.0 / size, 60.0, [1.0], "19.000 GFLOP a token to train, causal")

    monkeypatch.setattr(cases, "attempt", attempt)
    options = options_of(tmp_path)
    size, run = training.best_run("GPT", 4096, "bf16", ONE, options)
    assert asked == [8, 4, 2] and size == 4

    rate = training.report("3b GPT 4096 bf16", size, run, 32768, ("H100", 989e12, 700e12), {"peer": 1e5}, options)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    assert rate == 32768 / 0.5
    assert [row["metric"] for row in rows] == ["throughput", "MFU", "peak memory"]
    assert rows[0]["ratio"] == pytest.approx(rate / 1e5, abs=1e-4)
    assert rows[1]["value"] == pytest.approx(rate * 19e9 / 989e12, abs=1e-4)


def test_other_failures_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "attempt", lambda *_, **__: Failure("ValueError: wrong"))
    assert training.best_run("gated_retention", 4096, "bf16", ONE, options_of(tmp_path)) is None


def test_meshes_keep_the_tokens_of_a_gpu(tmp_path: Path) -> None:
    options = options_of(tmp_path, "--batch-tokens", "16384")
    assert [cases.sequences(4096, Mesh.of(name), options) for name in ("1", "DP2", "TP2", "PP2xDP2")] == [4, 8, 8, 16]
    # A replica has at least one sequence, however many GPUs share it.
    assert [cases.sequences(131072, Mesh.of(name), options) for name in ("1", "CP8", "DP2xCP4")] == [1, 1, 2]
    assert cases.sequences(32768, Mesh.of("CP8"), options) == 4
    flags = cases.flags_of("sliding_window", 4096, "delayed", 2, Mesh.of("TP2"), options)
    assert "yoco_3b_swa.yaml" in flags and "--sequence-parallel" in flags and "--fp8-recipe delayed" in flags


def test_only_where_asked_gpt_gets_our_loss(tmp_path: Path) -> None:
    def chunk_of(model: str, *argv: str) -> str:
        words = cases.flags_of(model, 4096, "bf16", 1, ONE, options_of(tmp_path, *argv)).split()
        return words[words.index("--loss-chunk-size") + 1]

    assert (chunk_of("gated_retention"), chunk_of("GPT"), chunk_of("GPT", "--chunk-gpt-loss")) == ("8192", "0", "8192")
    assert chunk_of("gated_retention", "--loss-chunk-size", "0") == "0"
    both = options_of(tmp_path, "--chunk-gpt-loss")
    assert "our chunked loss" in cases.title("GPT", 4096, "bf16", ONE, both)


@pytest.mark.parametrize("precision", cases.PRECISIONS)
@pytest.mark.parametrize("model", cases.MODELS)
def test_flags_of_every_precision_are_accepted(model: str, precision: str, tmp_path: Path) -> None:
    flags = cases.flags_of(model, 4096, precision, 1, ONE, options_of(tmp_path))
    args = arguments.parse([*MOCK.split(), *flags.split()])
    assert args.bf16 and args.use_distributed_optimizer  # gathering FP8 parameters needs it
    assert (args.fp8_recipe if args.fp8 else "bf16") == precision.removesuffix("-gather")
    assert args.fp8_param_gather == precision.endswith("-gather")


@pytest.mark.parametrize("model", cases.MODELS)
def test_flags_of_cuda_graphs_are_accepted(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(tmp_path, "--cuda-graph", "--model", "160m")
    flags = [*MOCK.split(), *cases.flags_of(model, 1024, "bf16", 1, ONE, options).split()]
    args = arguments.parse(flags)
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    with pytest.raises(ValueError, match="--cuda-graph-impl full_iteration needs a GPU"):
        checks.check_machine(args)
    assert args.cuda_graph_warmup_steps < options.steps // 2 and not args.check_for_nan_in_loss_and_grad
    assert "CUDA graph" in cases.title(model, 1024, "bf16", ONE, options)
