"""Windows in flash-linear-attention's format: it rotates the halves of a head there, and pairs in all other layers."""

from pathlib import Path

import torch
from support.exported import small_config
from torch import Tensor

from yoco_megatron.convert import tensor_names
from yoco_megatron.convert.readers import SafeTensors, Source, open_source
from yoco_megatron.convert.writers import write_fla
from yoco_megatron.hf.modeling_yoco import YocoForCausalLM


def written(folder: Path) -> Source:
    """A model of random weights, which `folder` holds in fla's format."""
    torch.manual_seed(0)
    config = small_config("sliding_window", rope_variant="standard", self_decoder_key_value_heads=1)
    state = YocoForCausalLM(config).state_dict()
    source = Source("hf", folder, config, dict.fromkeys(state, torch.float32), state.__getitem__)
    write_fla(source, folder, 10**8)
    return source


def test_there_and_back(tmp_path: Path) -> None:
    source = written(tmp_path)
    back = open_source("fla", str(tmp_path))
    described = source.config.to_dict()
    no_part = {name for name in described if name.startswith("mamba_")} | {"initializer_range"}
    assert {name: back.config.to_dict()[name] for name in described.keys() - no_part} == {
        name: described[name] for name in described.keys() - no_part
    }
    assert back.dtypes.keys() == source.dtypes.keys()
    assert all(torch.equal(back.load(name), source.load(name)) for name in source.dtypes)


def test_queries_meet_keys_as_ours_do(tmp_path: Path) -> None:
    """Products of rotated queries and keys, by fla.layers.attn.Attention: halves, theta^(-2j/D); fp64."""
    source = written(tmp_path)
    config, theirs = source.config, SafeTensors(tmp_path)
    width = config.self_decoder_head_dim
    x = torch.randn(9, config.hidden_size, dtype=torch.float64)
    frequencies = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(9)[:, None, None] * frequencies

    def by_pairs(weight: Tensor) -> Tensor:
        pairs = torch.view_as_complex((x @ weight.double().T).unflatten(1, (-1, width // 2, 2)).contiguous())
        return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(2)

    def by_halves(weight: Tensor) -> Tensor:
        a, b = (x @ weight.double().T).unflatten(1, (-1, width)).chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)

    for layer in range(config.num_self_decoder_layers):
        query, key = (f"model.self_layers.{layer}.mixer.{name}_proj.weight" for name in "qk")
        ours = torch.einsum("ihd,jd->hij", by_pairs(source.load(query)), by_pairs(source.load(key))[:, 0])
        q, k = (by_halves(theirs.load(tensor_names.fla(name))) for name in (query, key))
        torch.testing.assert_close(torch.einsum("ihd,jd->hij", q, k[:, 0]), ours, rtol=1e-12, atol=1e-12)
        assert not torch.equal(theirs.load(tensor_names.fla(query)), source.load(query))
