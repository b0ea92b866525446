"""A bad source or a full disk is one clear error: no output folder, nothing left beside it, the source as it was."""

import errno
import hashlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors.torch
import torch

from yoco_megatron.convert import convert as conversion
from yoco_megatron.convert import tensor_names, tokenizer_files, verify
from yoco_megatron.convert.convert import convert
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM


def config() -> YocoConfig:
    return YocoConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        self_decoder_heads=2,
        max_position_embeddings=64,
        architectures=["YocoForCausalLM"],
    )


@pytest.fixture
def source(tmp_path) -> Path:
    """A good exported folder in two files."""
    folder = tmp_path / "source"
    folder.mkdir()
    config().save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    shapes = tensor_names.shapes(config()).items()
    state = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes}
    weight_map = {}
    for number, part in enumerate((list(state)[:10], list(state)[10:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def change(source: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the second file, or remove them."""
    file = source / "model-00002-of-00002.safetensors"
    state = safetensors.torch.load_file(file)
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    safetensors.torch.save_file(state, file, {"format": "pt"})


def digest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(source: Path, match: str, kind: str = "hf", to: str = "fla") -> None:
    """The conversion says so, and leaves no trace."""
    before = digest(source)
    output = source.parent / "output"
    with pytest.raises(ValueError, match=match):
        convert(kind, str(source), to, str(output))
    assert digest(source) == before
    assert sorted(path.name for path in source.parent.iterdir()) == [source.name]


def test_good_one_is_taken(source):
    assert "agree within" in convert("hf", str(source), "fla", str(source.parent / "output"))
    assert sorted(path.name for path in source.parent.iterdir()) == ["output", "source"]
    with pytest.raises(ValueError, match="exists already"):
        convert("hf", str(source), "fla", str(source.parent / "output"))


def test_nothing_to_convert(source):
    refused(source, "--from megatron --to megatron: nothing to convert", "megatron", "megatron")


def test_files_of_no_size(source):
    with pytest.raises(ValueError, match="--max-shard-size 0 must be positive"):
        convert("hf", str(source), "fla", str(source.parent / "output"), shard_bytes=0)


def test_missing_shard(source):
    (source / "model-00002-of-00002.safetensors").unlink()
    refused(source, "model-00002-of-00002.safetensors is missing")


def test_truncated_shard(source):
    file = source / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 8)
    refused(source, "not a whole safetensors file")


def test_missing_tensor(source):
    change(source, **{"model.norm.weight": None})
    refused(source, r"1 tensors of its config.json are missing, first \['model.norm.weight'\]")


def test_extra_tensor(source):
    change(source, **{"model.norm.bias": torch.zeros(32)})
    refused(source, "model.norm.bias")


def test_wrong_shape(source):
    change(source, **{"model.norm.weight": torch.zeros(31)})
    refused(source, r"model.norm.weight is \[31\], its config.json asks for \[32\]")


def test_integers(source):
    change(source, **{"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
    refused(source, "not a float type")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("to", ["fla", "hf", "megatron"])
def test_not_finite(value, to, source):
    weight = torch.ones(32)
    weight[5] = value
    change(source, **{"model.norm.weight": weight})
    refused(source, "model.norm.weight holds 1 values that are NaN or infinite", to=to)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "YOCOForCausalLM"])
def test_other_architecture(architecture, source):
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [architecture]}))
    refused(source, f"says {architecture} under architectures, only YocoForCausalLM")


def test_no_folder_and_no_config(source, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        convert("hf", str(tmp_path / "nowhere"), "fla", str(tmp_path / "output"))
    refused(source, "no checkpoint of pretrain_yoco.py there", kind="megatron")
    refused(source, "no params.json there", kind="official")
    refused(source, "not that of flash-linear-attention", kind="fla", to="hf")
    (source / "config.json").write_text("{")
    refused(source, "is not JSON")
    (source / "config.json").unlink()
    refused(source, "no config.json there")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "config.json is not a JSON object"),
        (b"\xff\xfe", "config.json is not text"),
        ({"architectures": None}, "says nothing under architectures, only YocoForCausalLM"),
        ({"hidden_size": "32"}, "config.json describes no YOCO: .*hidden_size.* expected int"),
        ({"architectures": 5}, "says 5 under architectures, only YocoForCausalLM"),
        ({"architectures": []}, "says nothing under architectures"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json describes no YOCO: num_attention_heads 0"),
        ({"self_decoder": "mamba"}, "config.json describes no YOCO: self_decoder 'mamba' is unknown"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not model.embed_tokens.weight, .*tie_word_embeddings"),
        ({"training_facts": [1]}, "config.json: training_facts is list, not dict"),
        ({"training_facts": {"iteration": "x"}}, "config.json: 'iteration' is 'x', not int"),
        (b"[" * 100_000, "config.json is not JSON"),
    ],
)
def test_config_of_nothing(content, said, source):
    path = source / "config.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.write_bytes(content)
    refused(source, said)


def test_config_without_a_key(source):
    """A default in its place would be another model."""
    path = source / "config.json"
    content = json.loads(path.read_text())
    content["rope_tetha"] = content.pop("rope_theta")
    path.write_text(json.dumps(content))
    refused(source, r"config.json lacks rope_theta; did you mean rope_tetha\?")


@pytest.mark.parametrize("to", ["hf", "fla"])
def test_files_have_the_mode_that_the_umask_gives(to, source, monkeypatch):
    """Those of libraries, and copies of files that are more private or more public, too."""
    tokenizer = source.parent / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tokenizer / "tokenizer_config.json").chmod(0o600)
    monkeypatch.setattr(tokenizer_files, "load", lambda _: [])
    before = os.umask(0o027)
    try:
        convert("hf", str(source), to, str(source.parent / "output"))
        tokenizer_files.copy(tokenizer, source.parent / "output")
    finally:
        os.umask(before)
    files = [*(source.parent / "output").iterdir()]
    assert {"model.safetensors", "config.json", "tokenizer_config.json"} <= {file.name for file in files}
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in files} == {file.name: "0o640" for file in files}


@pytest.mark.parametrize("attention", [None, {}, {"type": "gated_retention"}])
def test_config_of_no_fla_model(attention, source):
    path = source / "config.json"
    halves = {"self_decoder_attn": attention, "cross_decoder_attn": attention}
    path.write_text(json.dumps(json.loads(path.read_text()) | halves))
    refused(source, "config.json describes no YOCO: (TypeError|KeyError)", kind="fla", to="hf")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 1, "b": "model.safetensors"}}', "gives 'a' the file 1, no name"),
        ('{"weight_map": {"a": ["model.safetensors"]}}', r"gives 'a' the file \['model.safetensors'\], no name"),
        ('{"weight_map": {"a": ""}}', "gives 'a' the file '', no name"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "gives 'a' the file '../model.safetensors', no name"),
    ],
)
def test_broken_index(index, said, source):
    (source / "model.safetensors.index.json").write_text(index)
    refused(source, f"model.safetensors.index.json .*{said}")


def test_tensor_in_two_files(source):
    change(source, **{"model.embed_tokens.weight": torch.zeros(64, 32)})
    refused(source, "model-00002-of-00002.safetensors holds model.embed_tokens.weight, as another file")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_pipes_are_not_waited_for(name, source):
    for file in (name, "model.safetensors.index.json"):
        (source / file).unlink(missing_ok=True)
    os.mkfifo(source / name)
    refused(source, f"{name} is (no regular file|missing)")


def test_broken_params_and_tracker(source):
    torch.save({}, source / "checkpoint.pth")
    for params, said in (
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "describes no YOCO: it lacks dim, n_layers"),
    ):
        (source / "params.json").write_text(params)
        refused(source, f"params.json {said}", kind="official", to="hf")
    (source / "latest_checkpointed_iteration.txt").write_text("abc")
    (source / "resolved_config.yaml").write_text("num-layers: 4")
    refused(source, "holds no iteration: name one with --iteration", kind="megatron", to="hf")


def test_weights_that_are_a_pickle_are_not_opened(source):
    """A pytorch_model.bin beside a good config: safetensors or nothing."""
    for file in source.glob("model*"):
        file.unlink()
    torch.save({"model.norm.weight": Evil(source / "evil")}, source / "pytorch_model.bin")
    refused(source, "model.safetensors is missing")
    assert not (source / "evil").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sliding_window", value) for value in (False, 0, True, -1, "128", 128.0)),
        ("dim", "32"),
        ("n_layers", None),
        ("n_layers", 3),
        ("n_layers", 10**9),
        ("n_attn_kv_heads", 0),
        ("max_seq_len", 1e9),
        ("rope_theta", 0.0),
        ("norm_eps", "x"),
    ],
)
def test_params_of_no_model(key, value, source):
    """The authors' code makes attention over everything of a window of false or 0, which is no YOCO."""
    params = {"dim": 32, "n_layers": 4, "hidden_dim": 48, "n_self_heads": 2, "n_attn_heads": 4, "vocab_size": 64}
    (source / "params.json").write_text(json.dumps(params | {key: value}))
    torch.save({}, source / "checkpoint.pth")
    theirs = {"n_layers": "n_layers|num_hidden_layers", "norm_eps": "rms_norm_eps"}.get(key, key)
    refused(source, f"params.json describes no YOCO: .*({theirs})", kind="official", to="hf")


def test_part_of_a_split_official_model(source):
    params = {"dim": 32, "n_layers": 4, "hidden_dim": 48, "n_self_heads": 2, "n_attn_heads": 4, "vocab_size": 64}
    (source / "params.json").write_text(json.dumps(params))
    torch.save({"embed_tokens.weight": torch.zeros(32, 32)}, source / "checkpoint.pth")
    refused(source, "32 of 64 rows of embed_tokens .* split by tensor parallelism", kind="official", to="hf")
    (source / "checkpoint.pth").rename(source / "checkpoint_last-model_part-0.pt")
    refused(source, "checkpoint_last-model_part-0.pt is one part", kind="official", to="hf")


def test_no_room(source, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    refused(source, "are needed there")


@pytest.mark.parametrize("to", ["fla", "hf"])
def test_disk_fills_up(to, source, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    refused(source, "No space left on device; nothing was left there", to=to)


def test_disk_fills_up_in_a_training_checkpoint(source, monkeypatch):
    import torch.distributed.checkpoint.filesystem as filesystem

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(filesystem, "_write_item", full)
    refused(source, "No space left on device", to="megatron")


def test_interrupted(source, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "compare", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert("hf", str(source), "fla", str(source.parent / "output"))
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_a_wrong_result_is_not_kept(source, monkeypatch):
    """Two matrices of one shape swapped on the way: the logits tell."""
    rename = tensor_names.fla

    def swapped(name: str) -> str:
        mixed_up = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        for one, other in mixed_up.items():
            if f"cross_layers.1.mlp.{one}" in name:
                return rename(name.replace(one, other))
        return rename(name)

    monkeypatch.setattr(conversion.writers.tensor_names, "fla", swapped)
    write = conversion.writers.write_fla

    def wrong_while_writing(*args):
        write(*args)
        monkeypatch.setattr(conversion.writers.tensor_names, "fla", rename)

    monkeypatch.setattr(conversion.writers, "write_fla", wrong_while_writing)
    refused(source, "logits differ from the source's")


def sliding_source(folder: Path, window: int) -> Path:
    """An exported folder of a model of windows."""
    sizes = {name: getattr(config(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    made = YocoConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, self_decoder="sliding_window",
                      sliding_window=window, architectures=["YocoForCausalLM"], initializer_range=0.2)  # fmt: skip
    torch.manual_seed(4)
    YocoForCausalLM(made).save_pretrained(folder)
    return folder


def test_a_wrong_window_is_not_kept(tmp_path, monkeypatch):
    """One key more than the source's: only a comparison longer than the window can tell."""
    write = conversion.writers.write_hf

    def longer(source, folder, shard_bytes):
        write(source, folder, shard_bytes)
        path = folder / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"sliding_window": content["sliding_window"] + 1}))

    monkeypatch.setattr(conversion.writers, "write_hf", longer)
    refused(sliding_source(tmp_path / "source", 150), "logits differ from the source's", to="hf")


def test_a_window_that_is_too_long_to_prove_is_named(tmp_path, monkeypatch):
    source = sliding_source(tmp_path / "source", 150)
    assert "logits of 214 tokens" in convert("hf", str(source), "hf", str(tmp_path / "output"))
    monkeypatch.setattr(verify, "LONGEST", 50)
    report = convert("hf", str(source), "hf", str(tmp_path / "short"))
    assert (
        "logits of 114 tokens" in report and "fewer tokens than its window of 150, which this does not prove" in report
    )


class Evil:
    """Pickles to a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_does_not_run(source):
    (source / "params.json").write_text("{}")
    torch.save({"embed_tokens.weight": Evil(source / "evil")}, source / "checkpoint.pth")
    refused(source, "cannot be read as weights alone; no code of it was run", kind="official", to="hf")
    assert not (source / "evil").exists()
