"""vLLM plugin: registers YocoForCausalLM, the architecture of exported yoco-megatron models."""

import inspect

VERSIONS = ("0.32", "0.33")  # of vLLM, whose insides change from one to the next
SELF_DECODERS = ("sliding_window", "gated_retention")
# Fields of a config that the plugin reads, or that say nothing of what it serves: layers of multi-token prediction are
# for training alone. Any other must have its default.
KNOWN = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_self_decoder_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "self_decoder", "self_decoder_heads", "self_decoder_head_dim"),
    *("self_decoder_key_value_heads", "sliding_window", "shared_kv_sets", "qk_norm", "qkv_bias", "decay_temperature"),
    *("rope_theta", "rope_variant", "rope_interleaved", "use_rope_scaling", "rope_scaling_factor", "scale_embedding"),
    *("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "initializer_range", "use_cache", "hidden_act"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "layer_types", "mtp_num_layers", "moe_intermediate_size"),
    *("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"),
}


def refuse_unserved(config) -> None:
    """Raises ValueError for a model that the plugin would not compute."""
    if config.self_decoder not in SELF_DECODERS:
        raise ValueError(f"this plugin serves {' or '.join(SELF_DECODERS)}, not self_decoder {config.self_decoder}")
    for name in inspect.get_annotations(type(config)):
        value = getattr(config, name)
        if name not in KNOWN and value != getattr(type(config), name):
            raise ValueError(f"this plugin does not serve {name} {value}")


def register() -> None:
    """Called by vLLM in each of its processes, more than once."""
    from vllm import ModelRegistry, __version__
    from vllm.logger import init_logger
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class YocoModelConfig(VerifyAndUpdateConfig):
        """What vLLM must know of a model before it is built."""

        @staticmethod
        def verify_and_update_model_config(model_config) -> None:
            config = model_config.hf_config
            refuse_unserved(config)
            if config.self_decoder == "sliding_window":
                # To vLLM a hybrid is what has other layers than attention, of which it knows no other names.
                config.layer_types = ["full_attention"] * config.num_hidden_layers

    if "YocoForCausalLM" not in ModelRegistry.get_supported_archs():
        if not __version__.startswith(VERSIONS):
            text = "yoco-vllm is for vLLM %s, this is %s: run its check.py"
            init_logger("vllm.yoco").warning(text, " and ".join(VERSIONS), __version__)
        MODELS_CONFIG_MAP["YocoForCausalLM"] = YocoModelConfig
        ModelRegistry.register_model("YocoForCausalLM", "yoco_vllm.model:YocoForCausalLM")
