"""A configuration that describes no model is one fast error that names the key, and the folder it was read from."""

import json
import math

import pytest

from yoco_megatron.hf.configuration_yoco import YocoConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
WRONG = [
    ("num_hidden_layers", 10**7),
    ("num_hidden_layers", 10**30),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 4.0),
    ("hidden_size", 10**12),
    ("hidden_size", "32"),
    ("hidden_size", True),
    ("hidden_size", None),
    ("vocab_size", -1),
    ("head_dim", 7),
    ("self_decoder_head_dim", 7),
    ("num_key_value_heads", 3),
    ("self_decoder_heads", 0),
    ("self_decoder_heads", 5),
    ("self_decoder_key_value_heads", 3),
    ("num_self_decoder_layers", 4),
    ("num_self_decoder_layers", -1),
    ("shared_kv_sets", 0),
    ("mtp_num_layers", -1),
    ("mtp_num_layers", 1.0),
    ("shared_kv_sets", 3),  # of two cross-decoder layers
    ("shared_kv_sets", None),
    ("shared_kv_sources", [1, 2]),  # of one set
    ("shared_kv_sources", [3]),
    ("shared_kv_sources", []),
    ("shared_kv_sources", [1.0]),
    ("cross_decoder_pattern", "A"),
    ("cross_decoder_pattern", "AB"),
    ("cross_decoder_pattern", "GG"),
    ("sliding_window", -1),
    ("sliding_window", 0),
    ("sliding_window", 1),  # see the comment at the field
    ("sliding_window", None),
    ("max_position_embeddings", -1),
    ("decay_temperature", 0),
    ("decay_temperature", -1.0),
    ("rms_norm_eps", math.inf),
    ("rms_norm_eps", 0.0),
    ("rope_theta", -1),
    ("rope_theta", math.nan),
    ("initializer_range", math.nan),
    ("rope_variant", "yarn"),
    ("rope_scaling_factor", 0.5),
    ("use_rope_scaling", "yes"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
    ("self_decoder", "mamba"),
    ("hidden_act", "x"),
    ("eos_token_id", 10**9),
    ("eos_token_id", [1, 64]),
    ("pad_token_id", -1),
    ("bos_token_id", "a"),
    ("tie_word_embeddings", "no"),
    ("architectures", 5),
    ("attn_implementation", "owner/kernel"),
    ("_attn_implementation", "paged|owner/kernel@main"),
    ("_attn_implementation_internal", {"": "owner/kernel"}),
    ("dtype", []),
    ("dtype", "int8"),
    ("torch_dtype", "float8"),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_what_describes_no_model_is_refused_by_name(key, value, tmp_path):
    YocoConfig(**SIZES, self_decoder="sliding_window").save_pretrained(tmp_path)
    assert YocoConfig.from_pretrained(tmp_path).num_hidden_layers == 4
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"config.json describes no YOCO: .*{key}") as error:
        YocoConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_sizes_that_are_not_given_follow_from_others():
    config = YocoConfig(**SIZES)
    assert (config.num_key_value_heads, config.head_dim, config.self_decoder_heads) == (4, 8, 4)
    assert config.self_decoder_head_dim == 8
    with pytest.raises(ValueError, match="self_decoder_heads 5 does not divide hidden_size 32"):
        YocoConfig(**SIZES, self_decoder_heads=5)
    assert YocoConfig(**SIZES, num_key_value_heads=2, self_decoder_heads=2).self_decoder_key_value_heads == 2
