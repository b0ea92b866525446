"""The exported gated DeltaNet equals the layer of transformers' Qwen3-Next, for the same weights."""

import pytest
import torch
from support.exported import small_config
from support.models import relative_error

from yoco_megatron.hf.gated_delta_yoco import YocoGatedDeltaNet


@torch.no_grad()
def test_equals_qwen3_next() -> None:
    """fp32, in which theirs computes whatever it is given: 2e-6 are some thirty roundings."""
    theirs_of = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    torch.manual_seed(0)
    config = small_config("gated_delta_net", hidden_size=48, self_decoder_heads=3)
    sizes = dict(linear_num_value_heads=3, linear_num_key_heads=3, linear_key_head_dim=16, linear_value_head_dim=16)
    layers = dict(num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=config.rms_norm_eps)
    theirs = theirs_of.Qwen3NextGatedDeltaNet(theirs_of.Qwen3NextConfig(hidden_size=48, **sizes, **layers), 0)
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    ours = YocoGatedDeltaNet(config, 0)
    # Theirs has q, k, v, z of one head after another, and so b and a; the convolution's channels in three blocks.
    qkvz = theirs.in_proj_qkvz.weight.view(3, 4, 16, 48).unbind(1)
    ba = theirs.in_proj_ba.weight.view(3, 2, 48).unbind(1)
    for name, weight in zip("qkvgba", (*qkvz, *ba)):
        getattr(ours, f"{name}_proj").weight.copy_(weight.reshape(-1, 48))
    for name, weight in zip("qkv", theirs.conv1d.weight.chunk(3)):
        getattr(ours, f"{name}_conv").weight.copy_(weight)
    ours.A_log.copy_(theirs.A_log)
    ours.dt_bias.copy_(theirs.dt_bias)
    ours.norm.weight.copy_(theirs.norm.weight)
    ours.o_proj.weight.copy_(theirs.out_proj.weight)
    x = torch.randn(2, 150, 48)
    found, _ = ours(x, None, None)
    assert relative_error(found, theirs(x)) < 2e-6
