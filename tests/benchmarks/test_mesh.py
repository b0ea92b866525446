"""Meshes of the benchmarks: names, and that pretrain_yoco.py and Megatron take the flags of each for both models."""

import argparse
import json
from pathlib import Path

import cases
import pytest
import training
from megatron.training.arguments import validate_args
from mesh import Mesh
from runs import MOCK, Run

from yoco_megatron import runtime
from yoco_megatron.startup import arguments

# Of four and of eight GPUs.
MESHES_3B = ["DP4", "TP2xDP2", "PP2xTP2", "PP2xTP2 VP2", "CP4", "TP2xCP2"]
MESHES_3B += ["DP8", "TP2xDP4", "PP2xTP2xDP2", "PP2xTP2xDP2 VP2", "CP8", "TP2xCP4"]
MESHES_13B = ["TP2xPP2", "TP2xPP4", "TP4xPP2"]


def options_of(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cases.add_arguments(parser)
    return parser.parse_args(argv)


def test_names() -> None:
    assert Mesh.of("PP2xTP4xDP2 VP3") == Mesh("PP2xTP4xDP2 VP3", tp=4, pp=2, dp=2, vp=3)
    assert Mesh.of("CP16").cp == Mesh.of("CP16").gpus == 16
    assert Mesh.of("1").gpus == 1 and Mesh.of("1").flags == ""
    assert Mesh.of("PP2xTP2xDP2 VP2").gpus == 8
    assert Mesh.of("TP2xDP2xEP4") == Mesh("TP2xDP2xEP4", tp=2, dp=8, ep=4)


def test_overlap_where_there_is_tensor_parallelism() -> None:
    options = options_of("--tp-comm-overlap")
    for name, overlaps in (("1", False), ("DP2", False), ("TP2xDP2", True)):
        flags = cases.flags_of("GPT", 4096, "bf16", 1, Mesh.of(name), options).split()
        assert ("--tp-comm-overlap" in flags) == overlaps
    assert cases.title("GPT", 4096, "bf16", Mesh.of("TP2"), options).endswith("TP2 --tp-comm-overlap")


@pytest.mark.parametrize("name", ["", "8", "DP1", "DP", "XP2", "TP2xTP2", "TP2 PP2", "TP2x", "VP2", "TP2 VP2", "tp2"])
def test_what_is_no_mesh_is_refused(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no mesh"):
        Mesh.of(name)


def test_a_user_reads_why(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["training.py", "--meshes", "1", "TP2xQP4"])
    with pytest.raises(SystemExit):
        training.main()
    assert "'TP2xQP4' is no mesh: 'QP4' in it; expected" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["GPT", "gated_retention"])
@pytest.mark.parametrize(
    ("size", "name"), [("3b", name) for name in MESHES_3B] + [("13b", name) for name in MESHES_13B]
)
def test_flags_are_accepted(size: str, name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, options = Mesh.of(name), options_of("--model", size)
    length = 131072 if mesh.cp > 1 else 4096
    flags = cases.flags_of(model, length, "bf16", 1, mesh, options)
    monkeypatch.setenv("WORLD_SIZE", str(mesh.gpus))
    monkeypatch.setattr(runtime, "has_transformer_engine", lambda: True)  # Megatron's context parallelism is its own
    args = arguments.parse([*MOCK.split(), *flags.split()])
    validate_args(args)
    assert args.data_parallel_size == mesh.dp
    assert (args.virtual_pipeline_model_parallel_size or 1) == mesh.vp
    sizes = args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size
    assert sizes == (mesh.tp, mesh.pp, mesh.cp)
    stages = mesh.pp * mesh.vp
    ends = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    assert model != "GPT" or (args.num_layers + ends) % stages == 0
    assert args.global_batch_size % (mesh.dp * mesh.pp) == 0 or mesh.cp > 1  # an interleaved pipeline's micro-batches


@pytest.mark.parametrize("model", ["GPT", "gated_retention"])
@pytest.mark.parametrize(("name", "ep", "etp"), [("1", 1, 1), ("EP2", 2, 1), ("EP4", 4, 1), ("TP2xEP2", 2, 2)])
def test_experts_of_both_models(name: str, ep: int, etp: int, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh.of(name)
    options = options_of("--model", "1.4b", "--layers", "12", "--with-config", "benchmarks/experts.yaml")
    monkeypatch.setenv("WORLD_SIZE", str(mesh.gpus))
    monkeypatch.setattr(runtime, "has_transformer_engine", lambda: True)
    args = arguments.parse([*MOCK.split(), *cases.flags_of(model, 4096, "bf16", 4, mesh, options).split()])
    validate_args(args)
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (ep, etp)
    assert args.data_parallel_size == mesh.dp
    assert (args.num_experts, args.moe_router_topk, args.moe_ffn_hidden_size) == (16, 4, 1024)
    assert cases.title(model, 4096, "bf16", mesh, options).startswith(f"1.4b experts 12 layers {model} 4096 bf16")


def test_rows_of_a_mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Beside the GPT on the same mesh and, whatever the order of --meshes, beside one GPU; what is received, too."""
    seconds = {"GPT": 2.0, "GPT CP4 a2a": 4.0, "gated_retention": 1.0, "gated_retention CP4": 1.6}
    asked = []

    def attempt(name: str, flags: str, gpus: int, timeout: int, verbose: bool, script: str) -> Run:
        case = name.replace("3b ", "").replace(" 32768 bf16", "").split(",")[0]
        asked.append((case, gpus, "--cp-comm-type a2a" in flags))
        return Run(seconds[case], 60.0, [1.0], "19.000 GFLOP a token to train, causal")

    monkeypatch.setattr(cases, "attempt", attempt)
    monkeypatch.setattr(training, "measure_device", lambda: ("H100", 989e12, 700e12))
    output = tmp_path / "rows.jsonl"
    argv = ["--meshes", "CP4", "1", "--models", "GPT", "gated_retention", "--lengths", "32768", "--cp-comm-type", "a2a"]
    monkeypatch.setattr("sys.argv", ["training.py", *argv, "--output", str(output)])
    training.main()
    assert asked == [
        ("GPT", 1, False), ("gated_retention", 1, False), ("GPT CP4 a2a", 4, True), ("gated_retention CP4", 4, False),
    ]  # fmt: skip
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    ours = [row for row in rows if row["case"] == "3b gated_retention 32768 bf16 CP4, micro-batch 1"]
    ratios = {row["peer"]: row["ratio"] for row in ours if row["metric"] == "throughput"}
    assert ratios == {"Megatron GPT 32768 bf16 CP4 a2a, micro-batch 1": 2.5, "one GPU": 1 / 1.6}
    received = {row["case"].split()[1]: row["value"] for row in rows if row["metric"] == "received a step"}
    # Four sequences a step; the GPT's K,V, 8 heads of 128, in each of 26 layers: forward, backward, and their gradient.
    assert received["GPT"] == pytest.approx(4 * 26 * 3 * (3 / 4) * 32768 * 2 * 8 * 128 * 2 / 1e9, abs=5e-3)
    assert 0 < received["gated_retention"] < received["GPT"] / 5
    assert "62.5%" in capsys.readouterr().out
