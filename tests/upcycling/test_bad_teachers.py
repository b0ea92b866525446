"""A bad teacher, or flags that do not fit it, is one clear error: no output folder, nothing left beside it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.teachers import save_teacher, small_teacher
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from yoco_megatron.upcycling import upcycle as upcycling
from yoco_megatron.upcycling.upcycle import upcycle


@pytest.fixture
def teacher(tmp_path) -> Path:
    """A good one in several files."""
    small_teacher("llama").save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    return tmp_path / "teacher"


def run(teacher: Path, **changes: Any) -> str:
    flags: dict[str, Any] = dict(self_decoder="sliding_window", window=8, num_self_decoder_layers=None)
    flags |= dict(shared_kv_sets=1, shared_kv_from="middle") | changes
    return upcycle(str(teacher), "hf", str(teacher.parent / "output"), **flags)


def refused(teacher: Path, match: str, **changes: Any) -> None:
    """upcycle() says so in one line, and leaves no trace."""
    with pytest.raises(ValueError, match=match) as error:
        run(teacher, **changes)
    assert "\n" not in str(error.value)
    assert {path.name for path in teacher.parent.iterdir()} <= {"teacher"}


def configure(teacher: Path, **changes: Any) -> None:
    """Change fields of its config.json."""
    file = teacher / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_good_one_is_taken(teacher):
    table = run(teacher)
    assert "exact up to 8 tokens" in table and "k, v of layer 4" in table
    assert sorted(path.name for path in teacher.parent.iterdir()) == ["output", "teacher"]
    with pytest.raises(ValueError, match=r"--output .* exists already"):
        run(teacher)


def test_windows_that_are_gone(tmp_path):
    save_teacher("mistral", tmp_path / "teacher", sliding_window=4)
    table = run(tmp_path / "teacher")
    assert "exact up to 4 tokens" in table and "the teacher's windows of 4 are gone" in table


@pytest.mark.parametrize(("family", "what"), [("qwen2", "biases of q, k, v"), ("qwen3", "norms of queries and keys")])
def test_what_retention_has_no_place_for(family, what, tmp_path):
    save_teacher(family, tmp_path / "teacher")
    why = f"this {family} has {what}, for which --self-decoder gated_retention has no place: use sliding_window"
    refused(tmp_path / "teacher", why, self_decoder="gated_retention", window=None)


@pytest.mark.parametrize(
    ("family", "bias", "why"),
    [
        ("llama", {"attention_bias": True}, "_proj.bias is there: this llama has"),
        ("llama", {"mlp_bias": True}, "_proj.bias is there: this llama has biases"),
        ("qwen3", {"attention_bias": True}, "_proj.bias is there: this qwen3 has"),
    ],
)
def test_biases_that_a_yoco_cannot_hold(family, bias, why, tmp_path):
    save_teacher(family, tmp_path / "teacher", **bias)
    refused(tmp_path / "teacher", why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; known here are llama, mistral"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "its RoPE is .*'linear'.*; a YOCO knows",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "its RoPE is .*'dynamic'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is no SwiGLU's"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised"),
        ({"hidden_size": "wide"}, "config.json describes no llama"),
        ({"num_hidden_layers": 7}, "9 tensors of its config.json are missing"),
        ({"num_hidden_layers": 5}, "9 tensors belong to no model of its config.json"),
        ({"intermediate_size": 64}, r"is \[48, 32\], its config.json asks for \[64, 32\]"),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps 1.0"),
    ],
)
def test_config(changes, why, teacher):
    configure(teacher, **changes)
    refused(teacher, f"--teacher .*{why}")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"shared_kv_sets": 2}, "--shared-kv-sets 2 does not divide the 3 cross-decoder layers"),
        ({"num_self_decoder_layers": 6}, "--num-self-decoder-layers 6 must lie between 0 and 5"),
        ({"window": 0}, "--self-decoder-window 0 must be at least 2"),
        ({"self_decoder": "gated_retention"}, "--self-decoder-window is for --self-decoder sliding_window"),
        (
            {"self_decoder": "gated_delta_net"},
            "--self-decoder gated_delta_net cannot be made of a Transformer.s attention",
        ),
        ({"tokenizer": "nowhere"}, "--tokenizer nowhere: no such folder"),
    ],
)
def test_flags(changes, why, teacher):
    refused(teacher, why, **changes)


def test_no_folder(teacher):
    refused(teacher.with_name("nowhere"), "no such folder")
    refused(teacher.with_name("model.gguf"), "a GGUF file is quantised")


def test_shards(teacher):
    shards = sorted(teacher.glob("*.safetensors"))
    assert len(shards) > 2
    os.truncate(shards[1], shards[1].stat().st_size - 4)
    refused(teacher, f"{shards[1].name} is not a whole safetensors file")
    shards[1].unlink()
    refused(teacher, f"{shards[1].name} is missing")


def test_pickle_is_not_read(teacher):
    for file in teacher.glob("*.safetensors*"):
        file.unlink()
    (teacher / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refused(teacher, "pytorch_model.bin is a pickle, which could run code")


def test_nan(teacher):
    shard = min(teacher.glob("*.safetensors"))
    state = safetensors.torch.load_file(shard)
    name = next(name for name in state if name.startswith("model.layers"))
    state[name].flatten()[0] = torch.nan
    safetensors.torch.save_file(state, shard, {"format": "pt"})
    refused(teacher, "NaN|differs by nan")


def test_tokenizer_of_another_size(teacher):
    words = {str(i): i for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(teacher)
    refused(teacher, "has ids up to 99, the model only 96 rows")


def test_full_disk(teacher, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upcycling.convert.writers, "write_hf", full)
    refused(teacher, "No space left on device; nothing was left there")


def test_convention_that_is_not_known(teacher, monkeypatch):
    """A layer that does not compute what it must is an error, not a worse model."""
    monkeypatch.setattr("yoco_megatron.upcycling.teacher.Teacher.rope_theta", 1e4)
    refused(teacher, "layer 0 of the YOCO should compute what the teacher's does, and differs by")
