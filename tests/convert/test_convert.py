"""A model goes out to Hugging Face and comes back bit for bit, at any mesh, with its configuration."""

import io
import json
import pickle
import re
import shutil
from dataclasses import fields as dataclass_fields
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert.test_convert_bad_input import Evil
from support.cli import _main, train
from support.models import relative_error
from support.worlds import spawn
from transformers import AutoModelForCausalLM

from yoco_megatron.checkpoint.architecture import SWITCHES
from yoco_megatron.config.yoco_fields import YOCOFields
from yoco_megatron.convert import config_fields, tensor_names, verify
from yoco_megatron.convert.convert import convert
from yoco_megatron.convert.readers import SafeTensors, Source, TrainingTensors, checkpoint_folder, open_source
from yoco_megatron.convert.writers import write_megatron
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.mixers import options_of_others
from yoco_megatron.startup.arguments import parse

ONE_STEP = ["--train-iters", "1", "--lr-warmup-iters", "0", "--bf16"]
UNTIED = ["--untie-embeddings-and-output-weights"]
TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
WINDOWS = ["--self-decoder", "sliding_window", "--self-decoder-heads", "4", "--self-decoder-query-groups", "2"]
MIXED = [*WINDOWS, "--self-decoder-pattern", "SR"]
MAMBA2 = ["--self-decoder", "mamba2", "--mamba-head-dim", "8", "--mamba-state-dim", "4", "--mamba-num-groups", "4"]
TWO_SETS = ["--shared-kv-sets", "2"]
TWO_SOURCES = ["--shared-kv-sources", "1", "2"]
QK_NORM = ["--qk-layernorm", "--add-qkv-bias"]
# name -> (processes, flags)
RUNS = {
    "TP1, retention, tied": (1, []),
    "TP2, windows and retention, two sets of K,V, untied": (2, [*TP2, *MIXED, *UNTIED, *TWO_SETS]),
    "TP2, Mamba-2 and gated DeltaNet, a gated memory unit, untied": (
        2,
        [*TP2, *MAMBA2, "--self-decoder-pattern", "GM", "--cross-decoder-pattern", "GA", *UNTIED],
    ),
    "PP2, retention, untied, multi-token prediction": (2, [*PP2, *UNTIED, "--mtp-num-layers", "2"]),
    "PP2, windows, tied": (2, [*PP2, *WINDOWS]),
    "TP2, retention, untied": (2, [*TP2, *UNTIED, "--sequence-parallel"]),
    "TP1, windows, untied, fp32": (1, [*WINDOWS, *UNTIED]),
    "TP2, windows, K,V of two sources, QK-norm and biases": (2, [*TP2, *WINDOWS, *TWO_SOURCES, *QK_NORM]),
    "TP1, retention, QK-norm and biases": (1, QK_NORM),
    "PP2 of two chunks each, retention, tied": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "CP2, windows, tied": (2, ["--context-parallel-size", "2", *WINDOWS]),
    "DP2, distributed optimizer, retention, untied": (2, ["--use-distributed-optimizer", *UNTIED]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> folder of a checkpoint after one step."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            processes, flags = RUNS[name]
            done[name] = tmp_path_factory.mktemp("trained")
            step = ONE_STEP[: -1 if "fp32" in name else None]
            train(processes, *flags, *step, "--save", str(done[name]), "--save-interval", "1")
        return done[name]

    return run


def in_fresh_process(*args, **options) -> str:
    """`convert` where Megatron has not been started yet."""
    return spawn(_convert, 1, (args, options))[0]


def _convert(args, options) -> str:
    return convert(*args, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The model's tensors of a training checkpoint."""
    found = TrainingTensors(checkpoint_folder(folder, None))
    return {name: found.load(name) for name in found.found()}


def entries(folder: Path) -> set[str]:
    """Everything that belongs to the model, extra states too."""
    others = ("optimizer.", "rng_state", "rerun_state", "common_state")
    metadata = TrainingTensors(checkpoint_folder(folder, None)).metadata
    return {name for name in metadata.state_dict_metadata if not name.startswith(others)}


@pytest.mark.parametrize("name", [*list(RUNS)[:4], *(pytest.param(n, marks=pytest.mark.slow) for n in list(RUNS)[4:])])
def test_round_trip_is_bitwise(name, trained, tmp_path):
    run = trained(name)
    report = in_fresh_process("megatron", str(run), "hf", str(tmp_path / "hf"), shard_bytes=40_000)
    assert "agree within" in report
    assert (tmp_path / "hf/model.safetensors.index.json").exists()
    if TWO_SETS[0] in RUNS[name][1]:
        card = (tmp_path / "hf/README.md").read_text()
        assert f"is {2 * 2 * 2 * 8 * 2} bytes a token for 2 global sets of K,V" in card  # K and V, heads, width, bf16
    report = in_fresh_process("hf", str(tmp_path / "hf"), "megatron", str(tmp_path / "back"))
    assert "agree within" in report
    before, after = tensors(run), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and len(before) > 20
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key
    assert entries(run) == entries(tmp_path / "back")
    architectures = [json.loads((folder / "architecture.json").read_text()) for folder in (run, tmp_path / "back")]
    assert architectures[0] == architectures[1]


@pytest.mark.slow
def test_training_goes_on_at_any_mesh(trained, tmp_path):
    """From the converted checkpoint as from the original's weights: the same losses, to the last printed digit."""
    run = trained("TP2, windows and retention, two sets of K,V, untied")
    in_fresh_process("megatron", str(run), "hf", str(tmp_path / "hf"))
    in_fresh_process("hf", str(tmp_path / "hf"), "megatron", str(tmp_path / "back"))
    steps = ["--bf16", "--train-iters", "4", "--lr-warmup-iters", "0", *MIXED, *UNTIED, *TWO_SETS]
    for processes, mesh in ((1, []), (2, TP2), (2, PP2)):
        original = train(processes, *steps, *mesh, "--load", str(run), "--finetune")
        converted = train(processes, *steps, *mesh, "--load", str(tmp_path / "back"))
        assert original.losses == converted.losses and len(original.losses) == 4
    assert train(processes, *steps, *mesh).losses[1] != converted.losses[1], "the weights make a difference"


@torch.no_grad()
def test_exported_folder(trained, tmp_path):
    """What a user loads: the generation config, the model card, the logits of the trained weights."""
    in_fresh_process("megatron", str(trained("TP1, retention, tied")), "hf", str(tmp_path / "hf"))
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {
        "README.md",
        "classification_yoco.py",
        "config.json",
        "configuration_yoco.py",
        "gated_delta_yoco.py",
        "mamba2_yoco.py",
        "generation_config.json",
        "model.safetensors",
        "mlp_yoco.py",
        "modeling_yoco.py",
        "peft_yoco.py",
        "recurrence_yoco.py",
    }
    card = (tmp_path / "hf/README.md").read_text()
    assert "library_name: transformers" in card and "| iterations | 1 |" in card and "| tokens seen | 256 |" in card
    row = r"\| of the run \| \d\.\d+ \| \d+\.\d+ \| not known \|"
    assert re.search(rf"## Evaluation at iteration 1\n\n.*\n.*\n{row}", card)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape == (1, 8)


@pytest.mark.parametrize("name", list(RUNS)[:2])
def test_layer_by_layer_is_whole(name, trained, tmp_path):
    """How a model too large for memory is compared: the same logits as of the whole one, to some roundings."""
    in_fresh_process("megatron", str(trained(name)), "hf", str(tmp_path / "hf"))
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(1))
    whole = verify._by_folder(tmp_path / "hf", None, tokens)
    for kind, folder in (("megatron", trained(name)), ("hf", tmp_path / "hf")):
        assert relative_error(verify._by_layers(open_source(kind, str(folder)), tokens), whole) < 2e-6


def test_extra_states_are_neither_needed_nor_read(tmp_path, monkeypatch):
    """Transformer Engine keeps FP8 scales there, as pickles; the weights beside them convert, no pickle is opened."""
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    config = YocoConfig(**shape, num_key_value_heads=2, self_decoder_heads=2, max_position_embeddings=64)
    weights = {name: torch.randn(shape) * 0.2 for name, shape in tensor_names.shapes(config).items()}
    dtypes = dict.fromkeys(weights, torch.float32)
    save = dcp.save
    trap = tmp_path / "trap"

    def with_scales(state, **options):
        found = [name for name in state if "_extra_state" in name]
        assert len(found) > 10
        return save(state | {name: [Evil(trap)] for name in found}, **options)

    monkeypatch.setattr(dcp, "save", with_scales)
    folder = tmp_path / "run"
    folder.mkdir()
    write_megatron(Source("hf", folder, config, dtypes, weights.__getitem__), folder)
    assert any(b"mkdir" in file.read_bytes() for file in (folder / "release").iterdir()), "the trap is set"
    opened = open_source("megatron", str(folder))
    assert all(torch.equal(opened.load(name), value) for name, value in weights.items())
    assert not trap.exists()


VOCABULARY = 256
# Flags of a large run in its resolved_config.yaml, which one process on a CPU must not take over.
LARGE_RUN = """
transformer-impl: transformer_engine
fp8-format: hybrid
fp8-recipe: delayed
fp8-amax-history-len: 1024
fp8-amax-compute-algo: max
fp8-param-gather: true
first-last-layers-bf16: true
use-distributed-optimizer: true
use-precision-aware-optimizer: true
overlap-grad-reduce: true
overlap-param-gather: true
overlap-param-gather-with-optimizer-step: true
defer-embedding-wgrad-compute: true
train-data-path: [/gone/text_document]
valid-data-path: [/gone/text_document]
"""


def _main_with(extra_state: object, flags: list[str]) -> None:
    """A training run whose linear layers keep this extra state; the output layer is none of Transformer Engine's."""
    from megatron.core.tensor_parallel import layers

    for kind in (layers.ColumnParallelLinear, layers.RowParallelLinear):
        kind.get_extra_state = lambda self: None if self.output_size == VOCABULARY else extra_state
    _main(flags)


def _scales() -> torch.Tensor:
    """As transformer_engine/pytorch/module/base.py:get_extra_state of 2.x writes FP8: the bytes of a pickle, here of a
    recipe whose class nobody can import, and of scales."""
    scales = {
        "scale_fwd": torch.rand(3),
        "amax_history_fwd": torch.rand(1024, 3),
        "extra_fp8_variables": {"num_gemms": 1},
    }
    recipe = b"ctransformer_engine.common.recipe\nDelayedScaling\n)R0"
    return torch.frombuffer(bytearray(b"\x80\x02" + recipe + pickle.dumps(scales)[2:]), dtype=torch.uint8)


@pytest.mark.parametrize(
    "extra_state",
    [
        pytest.param(_scales(), id="fp8"),
        pytest.param(io.BytesIO(b"as before 2.0"), id="fp8 of Transformer Engine 1", marks=pytest.mark.slow),
        pytest.param(torch.empty(0, dtype=torch.uint8), id="bf16", marks=pytest.mark.slow),
    ],
)
def test_checkpoint_of_transformer_engine(extra_state, tmp_path):
    """What its layers save, through Megatron's own saving at TP2: fused norms, an extra state a linear layer."""
    run = tmp_path / "run"
    train(2, *TP2, *ONE_STEP, "--save", str(run), "--save-interval", "1", entry=partial(_main_with, extra_state))
    with (run / "resolved_config.yaml").open("a") as file:
        file.write(LARGE_RUN)
    saved = TrainingTensors(checkpoint_folder(run, None))
    kept = saved._load("decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1", None)[0]
    assert torch.equal(kept, extra_state) if torch.is_tensor(kept) else kept.getvalue() == extra_state.getvalue()
    in_fresh_process("megatron", str(run), "hf", str(tmp_path / "hf"))
    in_fresh_process("hf", str(tmp_path / "hf"), "megatron", str(tmp_path / "back"))
    before, after = tensors(run), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert entries(run) == entries(tmp_path / "back")


# Fields of the trainer's that do not decide what the weights compute; each needs a reason.
NOT_THE_FUNCTION = {
    "architecture": "yoco, or the conversion refuses",
    "seq_length": "a length to train at; max_position_embeddings survives",
    "tied": "tie_word_embeddings, by the flag that unties",
    "init_law": "only draws the first weights",
    "retention_backend": "which kernel",
    "gated_delta_backend": "which kernel",
    "fp32_kv_transport": "rounding between pipeline stages",
    "retention_chunk_size": "rounding and memory",
    "loss_chunk_size": "memory of the loss",
    "z_loss_coeff": "a term of the loss",
    "recompute_elementwise": "memory of the activations",
    "keep_cross_attention": "memory of the activations",
    "loss_suffix": "which positions are trained on",
    "num_queries": "how many they are",
    "means_over": "of which layers costs are",
    "cross_decoder_positions": "computes no others, or all",
    "cp_cross_attention": "what context-parallel ranks exchange",
}


def test_every_field_has_its_place():
    ours = (
        {f.name for f in dataclass_fields(ModelShape)} | set(SWITCHES) | {f.name for f in dataclass_fields(YOCOFields)}
    )
    of_experts = {name for name in ours if name.startswith("moe_")} | {"num_experts"}  # their models are refused
    of_model = {
        *config_fields.SAME.values(),
        *config_fields.SOURCES,
        *config_fields.UNITS,
        *config_fields.OF_MIXERS,
        *config_fields.MULTI_TOKEN,
    }
    assert ours - of_experts - of_model == set(NOT_THE_FUNCTION)


UNUSUAL = {
    "num-layers": 7,
    "num-self-decoder-layers": 3,
    "hidden-size": 48,
    "ffn-hidden-size": 80,
    "num-attention-heads": 6,
    "group-query-attention": True,
    "num-query-groups": 3,
    "kv-channels": 10,
    "shared-kv-sets": 2,
    "shared-kv-sources": [1, 2],
    "qk-layernorm": True,
    "add-qkv-bias": True,
    "self-decoder": "sliding_window",
    "self-decoder-heads": 4,
    "self-decoder-query-groups": 2,
    "self-decoder-window": 9,
    "decay-temperature": 7.5,
    "rotary-base": 640000,
    "rope-variant": "standard",
    "use-rope-scaling": True,
    "rope-scaling-factor": 32.0,
    "rotary-interleaved": True,
    "no-scale-embedding": True,
    "norm-epsilon": 3e-6,
    "max-position-embeddings": 64,
    "untie-embeddings-and-output-weights": True,
    "padded-vocab-size": 384,
}


@pytest.mark.parametrize("changed", [None, *UNUSUAL])
def test_every_field_survives(changed, tmp_path):
    """Flags -> YocoConfig -> config.json -> YocoConfig -> flags: unusual values, and each one left at its default."""
    common = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--micro-batch-size", "1"]
    needed = {"num-layers": 5, "hidden-size": 24, "num-attention-heads": 3}
    values = {name: value for name, value in UNUSUAL.items() if name != changed}
    for option in options_of_others(values.get("self-decoder", "gated_retention")):
        values.pop(option.replace("_", "-"), None)
    if changed == "group-query-attention":
        del values["num-query-groups"]
    if changed == "use-rope-scaling":
        del values["rope-scaling-factor"]
    if changed == "num-query-groups":
        values["num-query-groups"] = 2
    values = needed | values
    if "num-self-decoder-layers" not in values:
        values["num-layers"] = 8

    def arguments(flags):
        args = parse([*common, "--seq-length", "64", "--config", *[f"{k}={_yaml(v)}" for k, v in flags.items()]])
        args.padded_vocab_size = args.padded_vocab_size or 128
        return args

    config = config_fields.from_args(arguments(values))
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    flags = config_fields.to_flags(again)
    flags.pop("seq-length")
    twice = config_fields.from_args(arguments(flags))
    for name in [*config_fields.SAME, "shared_kv_sources", "tie_word_embeddings"]:
        assert getattr(config, name) == getattr(again, name) == getattr(twice, name), name


def _yaml(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# As fla/models/yoco/modeling_yoco.py and fla/layers/yoco_attn.py spell them.
FLA_NAMES = {
    *(f"model.{name}.weight" for name in ("embeddings", "norm")),
    "lm_head.weight",
    *(f"model.shared_kv_builder.{name}.weight" for name in ("kv_norm", "k_proj", "v_proj")),
    *(f"model.self_layers.0.attn.{p}_proj.weight" for p in ("q", "k", "v", "g", "gk", "o")),
    *(f"model.cross_layers.0.attn.{p}_proj.weight" for p in ("q", "o")),
    *(f"model.{h}_layers.0.mlp.{p}_proj.weight" for h in ("self", "cross") for p in ("gate", "up", "down")),
    *(f"model.{h}_layers.0.{norm}.weight" for h in ("self", "cross") for norm in ("attn_norm", "mlp_norm")),
}


def test_fla_and_back(trained, tmp_path):
    """Our export in fla's format and read back again: the same tensors."""
    source = trained("PP2, retention, untied, multi-token prediction")
    in_fresh_process("megatron", str(source), "fla", str(tmp_path / "fla"))
    config = json.loads((tmp_path / "fla/config.json").read_text())
    opened = SafeTensors(tmp_path / "fla").found()
    assert {name.replace(".1.", ".0.") for name in opened} == FLA_NAMES
    assert config["architectures"] == ["YOCOForCausalLM"] and config["self_decoder_attn"]["rope_inv_freq"] == "yoco"
    in_fresh_process("fla", str(tmp_path / "fla"), "megatron", str(tmp_path / "back"))
    before, after = tensors(source), tensors(tmp_path / "back")
    before = {name: value for name, value in before.items() if not name.startswith("mtp_")}  # it has none
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    delta = YocoConfig(self_decoder="gated_delta_net", self_decoder_heads=4, self_decoder_head_dim=64, head_dim=128)
    written = config_fields.to_fla(delta)
    assert config_fields.from_fla(written).to_dict() == delta.to_dict()
    assert len({tensor_names.fla(name) for name in tensor_names.shapes(delta)}) == len(tensor_names.shapes(delta))
    assert tensor_names.fla("model.self_layers.0.mixer.q_conv.weight") == "model.self_layers.0.attn.q_conv1d.weight"
    written["self_decoder_attn"]["expand_v"] = 2.0
    with pytest.raises(ValueError, match=r"self_decoder_attn\.expand_v 2\.0 has no counterpart"):
        config_fields.from_fla(written)
    mamba = dict(self_decoder="mamba2", mamba_num_heads=8, mamba_head_dim=64, mamba_state_dim=16, mamba_num_groups=8)
    for other, what in (
        (mamba, "self-decoder of the kind mamba2"),
        ({"self_decoder": "sliding_window"}, "window layer with the paper's frequencies"),
        ({"num_hidden_layers": 4, "shared_kv_sets": 2}, "second set of shared K,V"),
        ({"qk_norm": True}, "norm of the shared K"),
        ({"qkv_bias": True}, "bias of the shared K,V"),
    ):
        with pytest.raises(ValueError, match=f"its YOCOForCausalLM has no {what}"):
            config_fields.to_fla(YocoConfig(**other))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_official_layout(window, tied, tmp_path):
    """A params.json and checkpoint.pth with the authors' names (written here, none was ever released)."""
    folder = tmp_path / "official"
    folder.mkdir()
    params = {"dim": 32, "n_layers": 4, "hidden_dim": 48, "n_self_heads": 2, "n_attn_heads": 4, "n_attn_kv_heads": 2}
    params |= {"vocab_size": 64, "rope_theta": 640000.0, "norm_eps": 1e-5, "max_seq_len": 128}
    if window:
        params["sliding_window"] = window
    (folder / "params.json").write_text(json.dumps(params))
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    state = {"embed_tokens.weight": draw(64, 32), "layer_norm.weight": draw(32)}
    state["output_projection.weight"] = state["embed_tokens.weight"] if tied else draw(64, 32)
    for half in ("self", "cross"):
        for index in range(2):
            layer = f"{half}_decoder.layers.{index}."
            projections = {"cross": "q", "self": "qkv"}[half] + ("" if window or half == "cross" else "g")
            state |= {f"{layer}mixer.{p}_proj.weight": draw(32, 32) for p in projections}
            state[f"{layer}mixer.out_proj.weight"] = draw(32, 32)
            if half == "self" and not window:
                state[f"{layer}mixer.gt_proj.weight"] = draw(2, 32)
            state |= {f"{layer}ffn.{p}.weight": draw(48, 32) for p in ("fc1", "gate")}
            state[f"{layer}ffn.fc2.weight"] = draw(32, 48)
            state |= {f"{layer}{norm}.weight": draw(32) for norm in ("mixer_layer_norm", "final_layer_norm")}
    state |= {f"cross_decoder.{p}_proj.weight": draw(16, 32) for p in "kv"}
    state["cross_decoder.kv_layer_norm.weight"] = draw(32)
    torch.save(state, folder / "checkpoint.pth")

    report = convert("official", str(folder), "hf", str(tmp_path / "hf"))
    assert "agree within" in report
    ours = open_source("hf", str(tmp_path / "hf"))
    assert ours.config.rope_theta == 640000 and ours.config.tie_word_embeddings == tied
    assert ours.config.self_decoder == ("sliding_window" if window else "gated_retention")
    fc1 = ours.load("model.cross_layers.1.mlp.gate_proj.weight")  # silu is on fc1 there
    assert torch.equal(fc1, state["cross_decoder.layers.1.ffn.fc1.weight"])
    shutil.rmtree(tmp_path / "hf")
