"""How the training benchmark chooses micro-batches and reads failures; the runs themselves are stand-ins."""

import argparse
import json
from pathlib import Path

import cases
import pytest
import training
import trial
from mesh import Mesh
from runs import MOCK, Failure, Run, last_error

from yoco_megatron import runtime
from yoco_megatron.startup import arguments, checks

ONE = Mesh.of("1")


def test_micro_batches_of_all_and_of_one() -> None:
    found = trial.micro_batches(["2", "4", "GPT=1"])
    assert found == {model: [1] if model == "GPT" else [4, 2] for model in cases.MODELS}
    assert trial.micro_batches(["GPT=1,2"])["sliding_window"] == [1]


@pytest.mark.parametrize("item", ["0", "LLAMA=1", "GPT=", "two"])
def test_micro_batches_that_mean_nothing_are_refused(item: str) -> None:
    with pytest.raises(ValueError, match="--micro-batches"):
        trial.micro_batches([item])


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
    choice = trial.fastest("GPT", 4096, "bf16", ONE, options)
    assert asked == [8, 4, 2] and choice.micro_batch == 4

    result = training.Result("gated_retention", "3b gated_retention 4096 bf16", choice, {0: choice.run}, 32768)
    peer = training.Result(
        "GPT", "3b GPT 4096 bf16", trial.Choice(4, "--flag", choice.run), {0: Run(1.0, None, [], "")}, 32768
    )
    training.report(result, ("H100", 989e12, 700e12), [peer], None, options.output)
    rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    assert result.rate == 32768 / 0.5
    assert [row["metric"] for row in rows] == ["throughput", "MFU", "peak memory"]
    assert (rows[0]["ratio"], rows[0]["peer"]) == (2.0, "Megatron GPT 4096 bf16 --flag, micro-batch 4")
    assert rows[1]["value"] == pytest.approx(result.rate * 19e9 / 989e12, abs=1e-4)


def test_a_trial_keeps_what_is_fastest_and_turns_alternate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def attempt(name: str, flags: str, gpus: int, timeout: int, verbose: bool, script: str) -> Run | Failure:
        model = "stock" if "stock" in script else "GPT" if "transformer_" in flags else "YOCO"
        order.append(model)
        if "full_iteration" in flags:
            return Failure("CUDA out of memory")
        # The loss of Transformer Engine makes GPT faster, recompute makes all slower, and so does each turn.
        seconds = 10 - 2 * ("impl te" in flags) + 5 * ("--recompute" in flags) - 4 * (model == "YOCO")
        return Run(seconds + order.count(model) / 10, 60.0, [1.0], "19.000 GFLOP a token to train, causal")

    monkeypatch.setattr(cases, "attempt", attempt)
    options = options_of(tmp_path)
    options.models, options.tune, options.rounds = ["GPT", "stock_GPT", "sliding_window"], ["GPT"], 3
    options.micro_batches = ["8"]
    gpt, stock, yoco = training.results(4096, "bf16", ONE, options)
    assert order[-6:] == ["GPT", "stock", "YOCO"] * 2
    assert gpt.choice.flags == "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te" and not stock.choice.flags
    assert gpt.peer_name == f"Megatron GPT 4096 bf16 {gpt.choice.flags}, micro-batch 8"
    assert gpt.runs[0].seconds == 8.3 and len(yoco.beside(gpt)) == 3

    training.report(yoco, ("CPU", 0.0, 0.0), [gpt, stock], None, options.output)
    rows = [json.loads(line) for line in options.output.read_text().splitlines() if "throughput" in line]
    assert ["its own trainer" in row["peer"] for row in rows] == [True, False]  # the newest is the one quoted
    ratios = sorted(ours / theirs for ours, theirs in yoco.beside(gpt))
    assert rows[1]["ratio"] == pytest.approx(ratios[1], abs=1e-4) and rows[1]["rounds"] == 3
    assert rows[1]["spread"] == pytest.approx([ratios[0], ratios[2]], abs=1e-4)


def test_other_failures_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "attempt", lambda *_, **__: Failure("ValueError: wrong"))
    assert trial.fastest("gated_retention", 4096, "bf16", ONE, options_of(tmp_path)) is None


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


@pytest.mark.parametrize("mesh", ["1", "TP2xDP2", "CP2"])
@pytest.mark.parametrize("model", ["GPT", "gated_retention"])
def test_flags_that_a_trial_tries_are_accepted(model: str, mesh: str, tmp_path: Path) -> None:
    full = "--flags=--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    for more in ([], [full]):
        options = options_of(tmp_path, *more)
        for answer in [one for question in trial.questions(model, "bf16", Mesh.of(mesh), options) for one in question]:
            flags = cases.flags_of(model, 4096, "bf16", 1, Mesh.of("1"), options)
            args = arguments.parse([*MOCK.split(), *flags.split(), *answer.split()])
            assert args.recompute_method != "block" or args.recompute_num_layers in (25, 24, 22, 12, 11, 9)


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
    size = "160m" if (Path("configs/model") / f"{cases.MODELS[model].format('160m')}.yaml").exists() else "3b"
    options = options_of(tmp_path, "--cuda-graph", "--model", size)
    flags = [*MOCK.split(), *cases.flags_of(model, 1024, "bf16", 1, ONE, options).split()]
    args = arguments.parse(flags)
    monkeypatch.setattr(runtime, "has_gpu", lambda: False)
    with pytest.raises(ValueError, match="--cuda-graph-impl full_iteration needs a GPU"):
        checks.check_machine(args)
    assert args.cuda_graph_warmup_steps < options.steps // 2 and not args.check_for_nan_in_loss_and_grad
    assert "CUDA graph" in cases.title(model, 1024, "bf16", ONE, options)


def test_the_plain_llama_trains_on_the_same_flags(tmp_path: Path) -> None:
    """A run on two processes with FSDP2 is read as any other."""
    options = options_of(tmp_path, "--model", "tiny", "--vocab-size", "500", "--batch-tokens", "64", "--steps", "4")
    mesh = Mesh.of("DP2")
    size, run = cases.largest_that_fits("plain_Llama", 64, "bf16", 1, mesh, options)
    assert isinstance(run, Run), run.reason
    assert size == 1 and len(run.losses) == 4 and all(abs(loss - 6.2) < 0.3 for loss in run.losses)
    assert training.gflop_per_token(run) > 0
