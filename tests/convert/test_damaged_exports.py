"""Folders that strangers export, damaged in many ways: `open_source` refuses each in time and memory, or reads it.

A config.json may be changed into that of another model of the same tensors, which nothing can tell.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.test_convert_bad_input import config
from safetensors.torch import save_file
from support.damage import Format, check

from yoco_megatron.convert import config_fields, tensor_names
from yoco_megatron.convert.readers import open_source


def exported(folder: Path) -> Path:
    """A folder that the project reads."""
    config().save_pretrained(folder)
    shapes = tensor_names.shapes(config()).items()
    save_file({name: torch.zeros(shape) for name, shape in shapes}, folder / "model.safetensors", {"format": "pt"})
    return folder


def config_json(folder: Path) -> Path:
    return exported(folder) / "config.json"


def weights(folder: Path) -> Path:
    """With little data, so that most of the damage is in the header."""
    return exported(folder) / "model.safetensors"


def index(folder: Path) -> Path:
    exported(folder)
    of = dict.fromkeys(tensor_names.shapes(config()), "model.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": of}))
    return path


def params(folder: Path) -> Path:
    """The authors'."""
    layout = {"dim": 32, "n_layers": 4, "hidden_dim": 48, "n_self_heads": 2, "n_attn_heads": 4, "n_attn_kv_heads": 2}
    layout |= {"vocab_size": 64, "rope_theta": 640000.0, "norm_eps": 1e-5, "max_seq_len": 128, "sliding_window": None}
    shapes = tensor_names.shapes(config()).items()
    state = {tensor_names.official(name): torch.zeros(shape) for name, shape in shapes}
    torch.save(state, folder / "checkpoint.pth")
    (folder / "params.json").write_text(json.dumps(layout))
    return folder / "params.json"


def read(kind: str) -> Any:
    """The model that a folder is taken for: what decides its function, and its tensors."""

    def of(path: Path) -> dict[str, Any]:
        source = open_source(kind, str(path.parent))
        fields = {name: getattr(source.config, name) for name in config_fields.SAME}
        return fields | {"tokens": source.config.eos_token_id, "dtypes": source.dtypes}

    return of


def describes_these_tensors(found: dict[str, Any]) -> bool:
    numbers = [value for value in found.values() if isinstance(value, int | float)]
    sizes = {name: found[name] for name in config_fields.SAME}
    same_shapes = tensor_names.shapes(type(config())(**sizes)) == tensor_names.shapes(config())
    return same_shapes and all(math.isfinite(number) and number >= 0 for number in numbers)


FORMATS = [
    Format("config.json", config_json, read("hf"), valid=describes_these_tensors),
    Format("model.safetensors", weights, read("hf")),
    Format("model.safetensors.index.json", index, read("hf")),
    Format("params.json", params, read("official"), valid=describes_these_tensors),
]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_damaged_files_are_refused_or_read_as_they_were(form: Format, tmp_path: Path) -> None:
    check(form, tmp_path)


def test_headers_of_safetensors(tmp_path: Path) -> None:
    """Offsets that overlap, leave holes, go back, or lie beyond the file; the library's own checks, held here."""
    path = weights(tmp_path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = "model.norm.weight"
    begin, end = header[name]["data_offsets"]
    wrong: list[dict[str, Any]] = [
        {"data_offsets": [begin - 4, end - 4]},
        {"data_offsets": [begin, end + 4]},
        {"data_offsets": [end, begin]},
        {"data_offsets": [-128, 0]},
        {"data_offsets": [2**62, 2**62 + 128]},
        {"data_offsets": [begin + 2**64, end + 2**64]},
        {"shape": [2**40]},
        {"shape": [-32]},
        {"shape": [2**33, 2**33]},
        {"dtype": "F31"},
        {"dtype": "I32"},
    ]
    shutil.copy(path, tmp_path / "whole")
    for changed in wrong:
        text = json.dumps(header | {name: header[name] | changed}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            open_source("hf", str(tmp_path))
    for size in (0, 1, length + 1, 2**40, 2**63):
        path.write_bytes(size.to_bytes(8, "little") + content[8:])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            open_source("hf", str(tmp_path))
