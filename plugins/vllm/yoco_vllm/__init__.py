"""vLLM plugin: registers YocoForCausalLM, the architecture of exported yoco-megatron models."""


def register() -> None:
    """Called by vLLM in each of its processes, more than once."""
    from vllm import ModelRegistry
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
        MODELS_CONFIG_MAP["YocoForCausalLM"] = YocoModelConfig
        ModelRegistry.register_model("YocoForCausalLM", "yoco_vllm.model:YocoForCausalLM")
