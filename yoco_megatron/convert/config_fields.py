"""The model's configuration in each format: every field that decides which function the weights compute.

Translation goes through YocoConfig, as tensors go through its names (tensor_names.py).
"""

import dataclasses
from argparse import Namespace
from typing import Any

from yoco_megatron.config.resolve import resolved
from yoco_megatron.costs.shape import ModelShape
from yoco_megatron.hf.configuration_yoco import YocoConfig
from yoco_megatron.mixers import GATED_DELTA_NET, GATED_RETENTION, MIXERS, SLIDING_WINDOW, mixers_in, options_of_others
from yoco_megatron.utils.errors import require

# YocoConfig's field -> Megatron's argument; the flag is its name with dashes.
SAME = {
    "vocab_size": "padded_vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_self_decoder_layers": "num_self_decoder_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "shared_kv_sets": "shared_kv_sets",
    "qk_norm": "qk_layernorm",
    "qkv_bias": "add_qkv_bias",
    "self_decoder": "self_decoder",
    "self_decoder_heads": "self_decoder_heads",
    "self_decoder_head_dim": "self_decoder_head_dim",
    "self_decoder_key_value_heads": "self_decoder_query_groups",
    "sliding_window": "self_decoder_window",
    "decay_temperature": "decay_temperature",
    "rope_theta": "rotary_base",
    "rope_variant": "rope_variant",
    "rope_interleaved": "rotary_interleaved",
    "use_rope_scaling": "use_rope_scaling",
    "rope_scaling_factor": "rope_scaling_factor",
    "scale_embedding": "scale_embedding",
    "rms_norm_eps": "layernorm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
}
# The same of a model with K,V of other layers than the self-decoder's last.
SOURCES = {"shared_kv_sources": "shared_kv_sources"}
# The same of a model with gated memory units.
UNITS = {"cross_decoder_pattern": "cross_decoder_pattern"}
# The same that are options of mixers, and fields of a model that has one of them.
OF_MIXERS = {name: name for name in ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups")}
# The same of a model with experts.
EXPERTS = {
    "num_experts": "num_experts",
    "moe_layer_freq": "moe_layer_freq",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "num_experts_per_tok": "moe_router_topk",
    "shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "shared_expert_gate": "moe_shared_expert_gate",
    "scoring_func": "moe_router_score_function",
    "router_pre_softmax": "moe_router_pre_softmax",
    "router_dtype": "moe_router_dtype",
    "use_expert_bias": "moe_router_enable_expert_bias",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "n_group": "moe_router_num_groups",
    "topk_group": "moe_router_group_topk",
}
# The same of a model with layers of multi-token prediction.
MULTI_TOKEN = {"mtp_num_layers": "mtp_num_layers"}
# What fla's gated DeltaNet leaves open, as ours has it. Its own defaults are others: fla writes them out in its config.
FLA_GATED_DELTA = {"use_gate": True, "use_short_conv": True, "allow_neg_eigval": False, "conv_size": 4, "expand_v": 1.0}
# Arguments whose flag has another name, or says the opposite.
FLAGS = {"layernorm_epsilon": "norm-epsilon", "scale_embedding": None}


def arguments_of(model: Any) -> dict[str, str]:
    """YocoConfig's field -> Megatron's argument: those that a model, by its YocoConfig or its arguments, has."""
    experts = {} if model.num_experts is None else EXPERTS
    unused = options_of_others(model.self_decoder)
    of_mixers = {field: dest for field, dest in OF_MIXERS.items() if dest not in unused}
    sources = SOURCES if getattr(model, "shared_kv_sources", None) else {}
    units = UNITS if getattr(model, "cross_decoder_pattern", None) else {}
    return SAME | sources | units | of_mixers | experts | (MULTI_TOKEN if model.mtp_num_layers else {})


def from_args(args: Namespace, **more: Any) -> YocoConfig:
    """The YocoConfig of the model that Megatron's arguments describe; `more` are further fields of it.

    `args` as `arguments.parse` returns them, with the padded vocabulary filled in.
    """
    require(
        args.architecture == "yoco",
        f"--architecture {args.architecture}: only YOCO models can be converted; a Transformer baseline is Megatron's "
        "own GPT, for which Megatron Bridge has converters",
    )
    for mixer in mixers_in(args.self_decoder):
        mixer.require("tensors", "conversion")
    values = vars(resolved(args))
    fields = {ours: values[theirs] for ours, theirs in arguments_of(args).items()}
    return YocoConfig(**fields, tie_word_embeddings=not args.untie_embeddings_and_output_weights, **more)


def sizes(config: YocoConfig) -> ModelShape:
    """The sizes of the model that an exported config describes.

    Raises:
        ValueError: sizes that describe no model.
    """
    read = {theirs: getattr(config, ours) for ours, theirs in arguments_of(config).items()}
    if isinstance(config.moe_layer_freq, list):
        read["moe_layer_freq"] = tuple(config.moe_layer_freq)
    if config.shared_kv_sources:
        read["shared_kv_sources"] = tuple(config.shared_kv_sources)
    names = {field.name for field in dataclasses.fields(ModelShape)} & read.keys()
    return ModelShape(
        architecture="yoco",
        seq_length=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        **{name: read[name] for name in names},
    )


def to_flags(config: YocoConfig) -> dict[str, Any]:
    """The flags of pretrain_yoco.py that describe the model, as a config file holds them: none of another mixer."""
    unused = options_of_others(config.self_decoder)
    names = {field: FLAGS.get(dest, dest) for field, dest in arguments_of(config).items() if dest not in unused}
    flags = {name: getattr(config, field) for field, name in names.items() if name is not None}
    flags |= {
        "architecture": "yoco",
        "group-query-attention": True,
        "no-scale-embedding": not config.scale_embedding,
        "untie-embeddings-and-output-weights": not config.tie_word_embeddings,
        "rotary-interleaved": config.rope_interleaved,
        "rotary-base": int(config.rope_theta) if float(config.rope_theta).is_integer() else config.rope_theta,
        "seq-length": config.max_position_embeddings,
    }
    if isinstance(config.moe_layer_freq, list) and config.num_experts is not None:  # one value of a flag, not several
        flags["moe_layer_freq"] = f"[{','.join(str(int(has)) for has in config.moe_layer_freq)}]"
    return {name.replace("_", "-"): value for name, value in flags.items()}


def from_official(params: dict[str, Any], tied: bool, max_position_embeddings: int) -> YocoConfig:
    """The authors' params.json (YOCOArgs), whose tying shows in the weights alone.

    Raises:
        ValueError: a key that is missing, or a value that describes no model.
    """
    needed = ("dim", "n_layers", "hidden_dim", "n_self_heads", "n_attn_heads", "vocab_size")
    missing = [name for name in needed if name not in params]
    require(not missing, f"it lacks {', '.join(missing)}: is it a YOCO's?")
    for name in (*needed, "n_attn_kv_heads", "max_seq_len"):
        value = params.get(name)
        whole = type(value) is int and (value >= 1 or name == "max_seq_len")
        require(whole or (value is None and name not in needed), f"{name} {value!r} must be a whole number, at least 1")
    require(params["n_layers"] % 2 == 0, f"n_layers {params['n_layers']} is odd, which has no half")
    length, window = params.get("max_seq_len") or -1, params.get("sliding_window")
    # dec/yoco.py takes windows for anything but None, and gives flash attention (window - 1, 0): -1 has no limit.
    require(
        window is None or (type(window) is int and window >= 1),
        f"sliding_window {window!r} is no window: null is gated retention, a number of keys is sliding windows, and "
        "attention over everything, which the authors' code makes of false and 0, no self-decoder of a YOCO has",
    )
    return YocoConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=params["hidden_dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_attn_heads"],
        num_key_value_heads=params.get("n_attn_kv_heads"),
        self_decoder=(GATED_RETENTION if window is None else SLIDING_WINDOW).name,
        self_decoder_heads=params["n_self_heads"],
        **({} if window is None else {"sliding_window": window}),
        rope_theta=params.get("rope_theta", 10000.0),
        rms_norm_eps=params.get("norm_eps", 1e-5),
        max_position_embeddings=length if length > 0 else max_position_embeddings,
        tie_word_embeddings=tied,
    )


def from_fla(config: dict[str, Any]) -> YocoConfig:
    """config.json of flash-linear-attention's YOCOForCausalLM.

    Raises:
        ValueError: a variant that is no YOCO of this project's (biases, norms on queries, ...).
    """
    own, cross = config["self_decoder_attn"], config["cross_decoder_attn"]
    width = config["hidden_size"]
    mixers = {mixer.fla_type: mixer.name for mixer in MIXERS.values() if mixer.fla_type}
    windows = own["type"] == SLIDING_WINDOW.fla_type
    frequencies = "fla" if windows else own.get("rope_inv_freq", "fla")  # its windows have no others
    no = {
        f"self_decoder_attn.type {own['type']}": own["type"] not in mixers,
        "cross_decoder_attn.qk_norm": cross.get("qk_norm", False),
        "cross_decoder_attn.qkv_bias": cross.get("qkv_bias", False),
        "cross_decoder_attn.window_size": cross.get("window_size") is not None,
        "attnres_block_size": config.get("attnres_block_size") is not None,
        f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "swish") not in ("swish", "silu"),
        "self_decoder_attn.qkv_bias": windows and own.get("qkv_bias", False),
        "different rope_inv_freq of the two halves": frequencies != cross.get("rope_inv_freq", "fla"),
        "different rope_theta of the two halves": own.get("rope_theta") != cross.get("rope_theta"),
    }
    if is_delta := own["type"] == GATED_DELTA_NET.fla_type:
        ours = FLA_GATED_DELTA | {"num_v_heads": own["num_heads"]}
        no |= {f"self_decoder_attn.{name} {own.get(name)}": own.get(name) != value for name, value in ours.items()}
    for what, found in no.items():
        require(not found, f"{what} has no counterpart in this project's YOCO")
    ffn = config.get("intermediate_size")
    if ffn is None:  # fla's own default, a multiple of 256
        ffn = 256 * ((int(width * (config.get("hidden_ratio") or 4) * 2 / 3) + 255) // 256)
    return YocoConfig(
        vocab_size=config["vocab_size"],
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=config["num_hidden_layers"],
        num_self_decoder_layers=config["num_self_decoder_layers"],
        self_decoder=mixers[own["type"]],
        num_attention_heads=cross["num_heads"],
        num_key_value_heads=cross.get("num_kv_heads"),
        self_decoder_heads=own["num_heads"],
        self_decoder_key_value_heads=own["num_v_heads"] if windows else None,
        self_decoder_head_dim=own["head_dim"] if is_delta else None,
        **({"sliding_window": own["window_size"]} if windows else {}),
        decay_temperature=own.get("gate_logit_normalizer", 16.0),
        rope_theta=own.get("rope_theta", 10000.0),
        rope_variant="yoco" if frequencies == "yoco" else "standard",
        rms_norm_eps=config.get("norm_eps", 1e-6),
        max_position_embeddings=config["max_position_embeddings"],
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        pad_token_id=config.get("pad_token_id"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )


def to_fla(config: YocoConfig) -> dict[str, Any]:
    """config.json for flash-linear-attention.

    Raises:
        ValueError: what its YOCO does not have.
    """
    mixer, *others = mixers_in(config.self_decoder)
    of_mixer: dict[str, Any] = {}
    if mixer is SLIDING_WINDOW:
        of_mixer = {"num_v_heads": config.self_decoder_key_value_heads, "window_size": config.sliding_window}
    elif mixer is GATED_DELTA_NET:
        heads = {"head_dim": config.self_decoder_head_dim, "num_v_heads": config.self_decoder_heads}
        of_mixer = heads | FLA_GATED_DELTA
    no = {
        f"self-decoder of the kind {mixer.name}": mixer.fla_type is None,
        "second mixer of the self-decoder": bool(others),
        "mixture of experts": config.num_experts is not None,
        "second set of shared K,V": config.shared_kv_sets > 1,
        "shared K,V of an earlier layer": config.shared_kv_sources is not None,
        "gated memory unit": config.cross_decoder_pattern is not None,
        "embedding that is not scaled": not config.scale_embedding,
        "RoPE by halves": not config.rope_interleaved,
        "window layer with the paper's frequencies": mixer is SLIDING_WINDOW and config.rope_variant == "yoco",
        "scaled RoPE": config.use_rope_scaling,
        "norm of the shared K": config.qk_norm,
        "bias of the shared K,V": config.qkv_bias,
        "heads that together are not as wide as the hidden state": any(
            heads * width != config.hidden_size
            for heads, width in (
                (config.num_attention_heads, config.head_dim),
                *([] if "head_dim" in of_mixer else [(config.self_decoder_heads, config.self_decoder_head_dim)]),
            )
        ),
    }
    for what, found in no.items():
        require(not found, f"--to fla: its YOCOForCausalLM has no {what}")
    rope = {"rope_theta": config.rope_theta, "rope_inv_freq": "yoco" if config.rope_variant == "yoco" else "fla"}
    return {
        "architectures": ["YOCOForCausalLM"],
        "model_type": "yoco",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_self_decoder_layers": config.num_self_decoder_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_eps": config.rms_norm_eps,
        "hidden_act": "swish",
        "tie_word_embeddings": config.tie_word_embeddings,
        "self_decoder_attn": {
            "type": mixer.fla_type,
            "num_heads": config.self_decoder_heads,
            "gate_logit_normalizer": config.decay_temperature,
            **rope,
            **of_mixer,
        },
        "cross_decoder_attn": {
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            **rope,
        },
        **{name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }
