"""Parameter counts against the paper's: YOCO-3B (App. D) and the scaling table (App. E)."""

from argparse import Namespace
from dataclasses import fields

import pytest
from support.models import VOCAB, build, tiny_config

from yoco_megatron.costs.flops import forward_flops_per_token
from yoco_megatron.costs.shape import ModelShape, body_parameters, parameter_count

CL100K = 100_288

# Megatron's defaults and ours, before anything is set.
DEFAULTS = {
    "architecture": "yoco",
    "self_decoder": "gated_retention",
    "num_self_decoder_layers": None,
    "self_decoder_heads": None,
    "self_decoder_query_groups": None,
    "self_decoder_window": 1024,
    "group_query_attention": False,
    "num_query_groups": 1,
    "kv_channels": None,
    "padded_vocab_size": CL100K,
    "seq_length": 2048,
    "untie_embeddings_and_output_weights": False,
}

YOCO_3B = {
    "num_layers": 26,
    "hidden_size": 3072,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 24,
    "group_query_attention": True,
    "num_query_groups": 8,
    "untie_embeddings_and_output_weights": True,
}

# Layers, hidden, heads; then millions of parameters that the paper's sizes give: body with gated retention,
# with sliding windows, of the Transformer; and the tied Transformer's total, which the sizes are named after.
SCALING = {
    "160M": (12, 768, 12, "89.7", "86.1", "85.0", "162"),
    "400M": (24, 1024, 16, "317", "304", "302", "405"),
    "830M": (24, 1536, 12, "713", "684", "680", "834"),
    "1.4B": (24, 2048, 16, "1267", "1216", "1208", "1413"),
    "2.7B": (32, 2560, 20, "2635", "2530", "2517", "2773"),
    "6.8B": (32, 4096, 32, "6746", "6476", "6443", "6853"),
    "13B": (40, 5120, 40, "13162", "12636", "12583", "13097"),
}


def shape(**args) -> ModelShape:
    return ModelShape.from_args(Namespace(**(DEFAULTS | args)))


def assert_millions(count: int, printed: str) -> None:
    """`count` is the printed number of millions, to its last digit."""
    unit = 10.0 ** -len(printed.partition(".")[2])
    assert count / 1e6 == pytest.approx(float(printed), abs=0.55 * unit)  # the half, and 8d/3 made a whole number


def test_yoco_3b():
    model = shape(**YOCO_3B)
    assert body_parameters(model) / 1e9 == pytest.approx(2.8291, abs=5e-5)  # the paper prints 2.83B
    count = parameter_count(model)
    assert count["embedding"] == count["output_layer"] == CL100K * 3072
    assert sum(count.values()) / 1e9 == pytest.approx(3.445, abs=5e-4)
    assert sum(parameter_count(shape(**YOCO_3B | {"untie_embeddings_and_output_weights": False})).values()) == (
        sum(count.values()) - count["output_layer"]
    )


def test_yoco_3b_part_by_part():
    d, F, h_s, kv = 3072, 8192, 24, 8 * 128
    count = parameter_count(shape(**YOCO_3B))
    assert count["self_decoder"] == 13 * (5 * d * d + d * h_s + 3 * d * F + 2 * d)
    assert count["shared_kv"] == 2 * d * kv + d
    assert parameter_count(shape(**YOCO_3B, shared_kv_sets=13))["shared_kv"] == 13 * 2 * d * kv + d
    assert count["cross_decoder"] == 13 * (2 * d * d + 3 * d * F + 2 * d)
    assert count["final_norm"] == d


def test_parameters_are_those_of_a_model_that_is_built(one_process):
    """With norms of queries and keys, and biases, where there is softmax attention; the same count is the planner's."""
    for kind in ("gated_retention", "sliding_window"):
        sizes = dict(self_decoder=kind, shared_kv_sets=2, self_decoder_heads=4, kv_channels=12, self_decoder_head_dim=6)
        norms, biases = {"qk_layernorm": True}, {"add_qkv_bias": True}
        sources = {"shared_kv_sources": (1, 2)}
        units = dict(num_layers=6, num_self_decoder_layers=2, shared_kv_sets=1, cross_decoder_pattern="GAGA", **norms)
        for more in (
            *([units | {"mtp_num_layers": 1}] if kind == "gated_retention" else []),
            {},
            norms,
            biases,
            norms | biases,
            {"mtp_num_layers": 2},
            norms | sources,
        ):
            model = build(tiny_config(**sizes | more))
            c = model.config
            names = [field.name for field in fields(ModelShape) if hasattr(c, field.name)]
            ours = ModelShape(
                padded_vocab_size=VOCAB, seq_length=8, tied=False, **{name: getattr(c, name) for name in names}
            )
            built = sum(p.numel() for p in model.parameters())
            assert sum(parameter_count(ours).values()) == built, (kind, more)


@pytest.mark.parametrize("size", SCALING)
def test_scaling_table(size):
    layers, d, heads, retention, window, transformer, transformer_tied = SCALING[size]
    common = {"num_layers": layers, "hidden_size": d, "num_attention_heads": heads}
    yoco = common | {"ffn_hidden_size": 3 * d}
    assert_millions(body_parameters(shape(**yoco, self_decoder_heads=d // 256)), retention)
    assert_millions(body_parameters(shape(**yoco, self_decoder="sliding_window")), window)
    llama = shape(**common, architecture="transformer", ffn_hidden_size=8 * d // 3)
    assert_millions(body_parameters(llama), transformer)
    assert_millions(sum(parameter_count(llama).values()), transformer_tied)


def test_unset_sizes_mean_what_they_mean_to_the_model():
    model = shape(**YOCO_3B)
    assert model.num_self_decoder_layers == model.num_cross_decoder_layers == 13
    assert model.self_decoder_heads == model.self_decoder_query_groups == 24
    assert model.kv_channels == model.self_decoder_head_dim == 128
    no_groups = shape(**YOCO_3B | {"group_query_attention": False, "num_query_groups": 8})
    assert no_groups.num_query_groups == 24


def test_transformer_has_no_self_decoder():
    model = shape(**YOCO_3B, architecture="transformer")
    assert model.num_self_decoder_layers == model.num_cross_decoder_layers == 0
    per_layer = 2 * 3072**2 + 2 * 3072 * 1024 + 3 * 3072 * 8192 + 2 * 3072
    assert parameter_count(model)["decoder"] == 26 * per_layer


def test_layout_is_free():
    all_cross = shape(**YOCO_3B, num_self_decoder_layers=0)
    assert parameter_count(all_cross)["self_decoder"] == 0 and all_cross.num_cross_decoder_layers == 26
    grouped = shape(**YOCO_3B, self_decoder="sliding_window", self_decoder_query_groups=8)
    full = shape(**YOCO_3B, self_decoder="sliding_window")
    assert body_parameters(full) - body_parameters(grouped) == 13 * 2 * 3072 * 16 * 128


def test_before_megatrons_validation():
    early = shape(**YOCO_3B | {"padded_vocab_size": None, "ffn_hidden_size": None})
    assert early.ffn_hidden_size == 8192  # 8/3 x 3072, a multiple of 64
    for count in (parameter_count, forward_flops_per_token):
        with pytest.raises(ValueError, match="--vocab-size"):
            count(early)


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"num_layers": 25}, "--num-layers 25 is odd"),
        ({"num_self_decoder_layers": 26}, "--num-self-decoder-layers 26"),
        ({"self_decoder_heads": 7}, "--self-decoder-heads 7"),
        ({"self_decoder_query_groups": 5}, "--self-decoder-query-groups 5"),
        ({"num_query_groups": 7}, "--num-query-groups 7"),
        ({"self_decoder": "mamba"}, "--self-decoder mamba"),
        ({"hidden_size": None}, "--hidden-size is missing"),
    ],
)
def test_sizes_that_describe_no_model_name_their_flag(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        shape(**YOCO_3B | wrong)
