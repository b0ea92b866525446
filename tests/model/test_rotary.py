"""Rotary positions: the authors' frequencies, interleaved pairs, fp32 arithmetic; Megatron's for the standard variant.

fp32 frequencies are compared bit for bit with the rounded exact ones; against Megatron's own table, which is computed
in fp32 throughout, 1e-6 relative (a few fp32 roundings).
"""

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from support.models import tiny_config
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.hf.modeling_yoco import YocoRotaryEmbedding
from yoco_megatron.model.layers.rotary import YOCORotaryEmbedding, inverse_frequencies, rotate

pytestmark = pytest.mark.usefixtures("one_process")
THETAS = [10_000.0, 640_000.0, 5e6, 8e7]  # pre-training and the paper's three length extensions


@pytest.mark.parametrize("width", [4, 16, 64, 128, 256])
@pytest.mark.parametrize("theta", THETAS)
def test_frequencies_run_from_one_to_exactly_one_over_theta(width, theta):
    omega = inverse_frequencies(width, theta, "yoco")
    assert omega.dtype == torch.float32 and omega.shape == (width // 2,)
    assert omega[0] == 1.0
    assert omega[-1] == torch.tensor(1.0 / theta, dtype=torch.float32)
    exact = [theta ** (-j / (width // 2 - 1)) for j in range(width // 2)]
    torch.testing.assert_close(omega, torch.tensor(exact), rtol=2**-23, atol=0)
    assert (omega.diff() < 0).all()


def test_a_single_pair_turns_by_one():
    assert inverse_frequencies(2, 10_000.0, "yoco").tolist() == [1.0]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("theta", THETAS)
def test_standard_variant_is_megatrons(theta, interleaved):
    config = tiny_config(rope_variant="standard", rotary_interleaved=interleaved)
    ours = YOCORotaryEmbedding(config, 64, theta)(50)
    megatrons = RotaryEmbedding(64, 1.0, rotary_interleaved=interleaved, rotary_base=theta)(50)
    assert ours.shape == megatrons.shape == (50, 1, 1, 64)
    torch.testing.assert_close(ours, megatrons, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_scaled_frequencies_are_llama_s(theta, factor):
    """--use-rope-scaling: those of Megatron's flag and of transformers' llama3, and bit for bit the exported ones."""
    config = tiny_config(rope_variant="standard", use_rope_scaling=True, rope_scaling_factor=factor)
    ours = YOCORotaryEmbedding(config, 64, theta).inv_freq
    assert (ours / inverse_frequencies(64, theta, "standard")).min() == pytest.approx(1 / factor)
    megatrons = RotaryEmbedding(64, 1.0, rotary_base=theta, rope_scaling=True, rope_scaling_factor=factor)
    torch.testing.assert_close(ours, megatrons.inv_freq, rtol=1e-6, atol=0)
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    llama = LlamaConfig(head_dim=64, rope_parameters=rope | {"original_max_position_embeddings": 8192})
    torch.testing.assert_close(ours, LlamaRotaryEmbedding(llama).inv_freq, rtol=1e-6, atol=0)
    fields = dict(rope_theta=theta, rope_variant="standard", use_rope_scaling=True, rope_scaling_factor=factor)
    assert torch.equal(ours, YocoRotaryEmbedding(YocoConfig(**fields), 64).inv_freq)


def test_variants_differ_where_the_paper_differs():
    yoco, standard = (inverse_frequencies(128, 10_000.0, variant) for variant in ("yoco", "standard"))
    assert yoco[0] == standard[0] and (yoco[1:] < standard[1:]).all()
    assert 0.001 < 1 - yoco[1] / standard[1] < 0.01
    assert standard[-1] / yoco[-1] > 1.1  # the longest wave is that much longer


def test_table_is_fp32_positions_from_zero():
    table = YOCORotaryEmbedding(tiny_config(), 16, 10_000.0)(40)
    assert table.dtype == torch.float32 and table.shape == (40, 1, 1, 16)
    omega = inverse_frequencies(16, 10_000.0, "yoco")
    wanted = torch.arange(40, dtype=torch.float32)[:, None] * omega
    assert torch.equal(table[:, 0, 0], wanted.repeat_interleave(2, dim=1))  # one angle for both of a pair


def test_rotation_turns_neighbouring_pairs(generator):
    config = tiny_config()
    x = torch.randn(5, 2, 3, 8, generator=generator, dtype=torch.float64)
    angles = YOCORotaryEmbedding(config, 8, 10_000.0)(5)
    y = rotate(x, angles, config)
    for position in range(5):
        for pair, omega in enumerate(inverse_frequencies(8, 10_000.0, "yoco").tolist()):
            cos, sin = math.cos(position * omega), math.sin(position * omega)
            a, b = x[position, ..., 2 * pair], x[position, ..., 2 * pair + 1]
            # 1e-6: the angle and its cosine are fp32.
            torch.testing.assert_close(y[position, ..., 2 * pair], a * cos - b * sin, rtol=0, atol=1e-6)
            torch.testing.assert_close(y[position, ..., 2 * pair + 1], a * sin + b * cos, rtol=0, atol=1e-6)


def test_products_depend_on_the_distance_alone(generator):
    config = tiny_config()
    q, k = (torch.randn(16, generator=generator, dtype=torch.float64).expand(30, 1, 1, 16) for _ in range(2))
    angles = YOCORotaryEmbedding(config, 16, 10_000.0)(30)
    scores = rotate(q, angles, config)[:, 0, 0] @ rotate(k, angles, config)[:, 0, 0].T
    for distance in (0, 3, 17):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=2e-5)  # angles up to 30 in fp32
    assert (scores.diagonal(-3)[0] - scores.diagonal(-17)[0]).abs() > 1e-3


def test_bfloat16_is_rounded_once(generator):
    """The arithmetic is fp32 whatever the activations are: the result is the fp32 result, rounded."""
    config = tiny_config()
    x = torch.randn(40, 2, 3, 16, generator=generator).bfloat16()
    angles = YOCORotaryEmbedding(config, 16, 10_000.0)(40)
    y = rotate(x, angles, config)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), angles, config).bfloat16())


def test_each_half_has_its_own_table():
    from support.models import build

    model = build(tiny_config(self_decoder_heads=2))
    assert model.self_rotary(10).shape[-1] == 32 and model.cross_rotary(10).shape[-1] == 8
    for rotary in (model.self_rotary, model.cross_rotary):
        assert rotary.inv_freq[-1] == torch.tensor(1e-4)
