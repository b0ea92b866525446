"""vLLM plugin: registers YocoForCausalLM, the architecture of exported yoco-megatron models."""

VERSIONS = ("0.32", "0.33")  # of vLLM, whose insides change from one to the next


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
            if config.self_decoder == "sliding_window":
                # To vLLM a hybrid is what has other layers than attention, of which it knows no other names.
                config.layer_types = ["full_attention"] * config.num_hidden_layers

    if "YocoForCausalLM" not in ModelRegistry.get_supported_archs():
        if not __version__.startswith(VERSIONS):
            text = "yoco-vllm is for vLLM %s, this is %s: run its check.py"
            init_logger("vllm.yoco").warning(text, " and ".join(VERSIONS), __version__)
        MODELS_CONFIG_MAP["YocoForCausalLM"] = YocoModelConfig
        ModelRegistry.register_model("YocoForCausalLM", "yoco_vllm.model:YocoForCausalLM")
